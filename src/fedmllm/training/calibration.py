"""Calibration to a client's own labels: what it holds often need not be learnt as being likely."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from fedmllm.models.encoding import Encoded, option_tokens
from fedmllm.models.load import VisionLanguageModel
from fedmllm.types import LabelCounts, Sample


def answer_counts(samples: Iterable[Sample]) -> dict[str, dict[str, int]]:
    """How often each answer occurs, by the set of options it was chosen from, whatever their order; free answers are not counted."""
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        if sample.options:
            counts.setdefault(_named(sample.options), Counter())[sample.answer] += 1
    return {options: dict(sorted(found.items())) for options, found in sorted(counts.items())}


def _named(options: Sequence[str]) -> str:
    """A set of options as a key that fits into JSON."""
    return json.dumps(sorted(options))


def calibrated(
    vlm: VisionLanguageModel, samples: Sequence[Sample], encoded: Sequence[Encoded], strength: float, labels: LabelCounts | None = None
) -> list[Encoded]:
    """The samples with ``strength log p_k,-i(option)`` to be added to their options' logits in training.

    ``p_k,-i(o) = (n_o - [o = y_i] + 1) / (n - 1 + number of options)`` counts answers among the *other* samples of the same options, whatever
    their order: those of ``labels``, or the client's own without; y_i is the sample's own answer. With that in the counts, options that
    occur once would lean towards the right answer by log 2. Where ``n_o`` samples share it, leaving one out changes the log-odds by
    ``log(1 + 1 / n_o)``. Samples without options stay as they are.
    """
    counts = labels or answer_counts(samples)
    return [
        replace(tensors, option_bias=_bias(vlm, sample, counts[_named(sample.options)], strength)) if sample.options else tensors
        for sample, tensors in zip(samples, encoded, strict=True)
    ]


def _bias(vlm: VisionLanguageModel, sample: Sample, counts: Mapping[str, int], strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    others = torch.tensor([max(0, counts.get(option, 0) - (option == sample.answer)) for option in sample.options])
    shares = (others + 1) / (others.sum() + len(others))
    return torch.tensor(option_tokens(vlm, sample)), strength * shares.log()
