"""Calibration to a client's own labels: what it holds often need not be learnt as being likely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmllm.models.encoding import Encoded, option_tokens
from fedmllm.models.load import VisionLanguageModel
from fedmllm.types import Sample


def calibrated(vlm: VisionLanguageModel, samples: Sequence[Sample], encoded: Sequence[Encoded], strength: float) -> list[Encoded]:
    """The samples with ``strength log p_k,-i(option)`` to be added to their options' logits in training.

    ``p_k,-i(o) = (n_o - [o = y_i] + 1) / (n - 1 + number of options)`` counts answers among the client's *other* samples of the same
    options, whatever their order; y_i is the sample's own answer. With that in the counts, options that occur once would lean towards
    the right answer by log 2. Where ``n_o`` samples share it, leaving one out changes the log-odds by ``log(1 + 1 / n_o)``.
    Samples without options stay as they are.
    """
    counts: dict[frozenset[str], Counter[str]] = {}
    for sample in samples:
        counts.setdefault(frozenset(sample.options), Counter())[sample.answer] += 1
    return [
        replace(tensors, option_bias=_bias(vlm, sample, counts[frozenset(sample.options)], strength)) if sample.options else tensors
        for sample, tensors in zip(samples, encoded, strict=True)
    ]


def _bias(vlm: VisionLanguageModel, sample: Sample, counts: Counter[str], strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    others = torch.tensor([counts[option] - (option == sample.answer) for option in sample.options])
    shares = (others + 1) / (others.sum() + len(others))
    return torch.tensor(option_tokens(vlm, sample)), strength * shares.log()
