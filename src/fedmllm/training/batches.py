"""From samples to optimizer steps: cached encoding, order, micro-batches and their weights in the loss."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import ReferenceType, ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmllm.data.fingerprint import prompt_key
from fedmllm.data.prompts import Wording, target, to_messages, wording
from fedmllm.errors import DataError, ModelError
from fedmllm.models.encoding import Batch, Encoded, collate, encode, option_tokens
from fedmllm.models.load import VisionLanguageModel
from fedmllm.types import Message, Sample


class Encoder:
    """Encodes samples as tensors, with a cache of limited memory that evicts the least recently used sample first.

    The cache key is computed from a sample's prompt, images and answer (``data.fingerprint.prompt_key``). Splits, scenarios and datasets can
    therefore share an encoder, even if they change a sample without changing its id. The key is computed once per sample object.

    If the model caches image features (``vlm.features``), they are computed here and the pixels, which take nearly all of a sample's
    memory, are dropped.

    Args:
        vlm: the model to encode for.
        style: the wording of the prompts, or the name of a built-in one.
        max_bytes: memory limit of the cache.
    """

    def __init__(self, vlm: VisionLanguageModel, style: str | Wording, max_bytes: int = 1 << 30) -> None:
        self._vlm, self._wording, self._max_bytes = vlm, wording(style), max_bytes
        self._kept: OrderedDict[bytes, Encoded] = OrderedDict()
        self._bytes = 0
        self._keys: dict[int, tuple[ReferenceType[Sample], bytes]] = {}

    def __call__(self, sample: Sample) -> Encoded:
        """Return the sample's prompt and target as tensors.

        Raises:
            ModelError, DataError: if the sample cannot be encoded; the message names it.
        """
        key = self._key(sample)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        encoded = self._encoded(sample)
        if self._vlm.features is not None:
            encoded = self._vlm.features.standing_for(encoded, lambda: self._encoded(sample))
        self._kept[key] = encoded
        self._bytes += _size(encoded)
        while self._bytes > self._max_bytes:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return encoded

    def _key(self, sample: Sample) -> bytes:
        """Return the sample's cache key. Keys are remembered by object identity, so that content is not hashed again in every round."""
        known = self._keys.get(id(sample))
        if known is not None and known[0]() is sample:
            return known[1]
        key = prompt_key(*self._worded(sample))
        self._keys[id(sample)] = ref(sample, partial(self._keys.pop, id(sample))), key
        return key

    def _worded(self, sample: Sample) -> tuple[tuple[Message, ...], str]:
        with _naming(sample):
            return to_messages(sample, self._wording), target(sample)

    def _encoded(self, sample: Sample) -> Encoded:
        messages, answer = self._worded(sample)
        with _naming(sample):
            if sample.options:
                # Checks that the options can be told apart, so that the error occurs here and not when the sample is scored.
                option_tokens(self._vlm, sample)
            return encode(self._vlm, messages, answer)


@contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    """Add the sample's id to errors raised in this block."""
    try:
        yield
    except (ModelError, DataError) as error:
        raise type(error)(f"sample {sample.id}: {error}") from error


def _size(encoded: Encoded) -> int:
    return encoded.input_ids.nbytes + sum(tensor.nbytes for tensor in (*encoded.extras.values(), *encoded.by_token.values()))


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step, by micro-batch.

    Attributes:
        micro_batches: the samples.
        separate: whether a sample's loss is the mean over its own answer tokens, so that it does not depend on other samples.
    """

    micro_batches: tuple[tuple[Encoded, ...], ...]
    separate: bool = False

    @property
    def samples(self) -> list[Encoded]:
        """All samples of the step, in order."""
        return [sample for micro in self.micro_batches for sample in micro]


def steps(samples: Sequence[Encoded], batch_size: int, accumulation: int, rng: np.random.Generator) -> Iterator[Step]:
    """Yield the steps of one epoch in random order: ``accumulation`` micro-batches of ``batch_size`` samples each; the last may be smaller."""
    order = rng.permutation(len(samples))
    micro = [tuple(samples[i] for i in order[k : k + batch_size]) for k in range(0, len(order), batch_size)]
    for first in range(0, len(micro), accumulation):
        yield Step(tuple(micro[first : first + accumulation]))


def poisson_steps(samples: Sequence[Encoded], rate: float, count: int, uniform: Callable[[int], NDArray[np.float64]]) -> Iterator[Step]:
    """Yield ``count`` steps that draw every sample independently with probability ``rate``. A step may be empty.

    Args:
        samples: the samples to draw from.
        rate: the probability.
        count: number of steps.
        uniform: returns a number of independent uniform numbers in (0, 1).
    """
    for _ in range(count):
        drawn = np.flatnonzero(uniform(len(samples)) < rate).tolist()
        yield Step((tuple(samples[i] for i in drawn),), separate=True)


def loss_weights(step: Step) -> list[float]:
    """Return the weight of each sample's answer tokens in the step's loss, in the step's order.

    Gradient accumulation averages the micro-batches' mean losses. A token of micro-batch m, which has M_m answer tokens, therefore
    weighs 1 / (number of micro-batches * M_m). With these weights the micro-batches can run as one batch or one by one. In a ``separate``
    step, a token of a sample with M_i answer tokens weighs 1 / M_i.
    """
    if step.separate:
        return [1 / sample.answer_length for sample in step.samples]
    tokens = [sum(sample.answer_length for sample in micro) for micro in step.micro_batches]
    return [1 / (len(tokens) * count) for count, micro in zip(tokens, step.micro_batches, strict=True) for _ in micro]


PASS_COST = {"cpu": 128}
"""Fixed cost of a forward and backward pass by device type, in tokens. On other devices it equals the largest batch."""


def passes(
    vlm: VisionLanguageModel, clients: Sequence[Step], max_tokens: int, max_rows: int | None = None
) -> Iterator[tuple[Batch, Tensor, list[int]]]:
    """Yield one step of each of several clients in as few padded batches as possible, or in more if that saves padding. A batch has at most
    ``max_tokens`` tokens and ``max_rows`` samples.

    Returns:
        each batch, its samples' loss weights of shape (samples, 1), and the position of each sample's client, in ascending order.
    """
    samples = [sample for step in clients for sample in step.samples]
    weights = [weight for step in clients for weight in loss_weights(step)]
    owners = [k for k, step in enumerate(clients) for _ in step.samples]
    for group in batched(vlm, samples, max_tokens, max_rows):
        batch = collate(vlm, [samples[i] for i in group])
        yield batch, torch.tensor([[weights[i]] for i in group], device=vlm.device), [owners[i] for i in group]


def batched(vlm: VisionLanguageModel, samples: Sequence[Encoded], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Return the positions of the samples in each forward pass, grouped for the lowest cost on the model's device."""
    return pack([len(sample.input_ids) for sample in samples], max_tokens, PASS_COST.get(vlm.device.type, max_tokens), max_rows)


def pack(lengths: Sequence[int], max_tokens: int, pass_cost: int, max_items: int | None = None) -> list[list[int]]:
    """Return the cheapest groups of at most ``max_items`` items (None for any number) whose padded size (items x longest item) is at most
    ``max_tokens``. A longer item forms its own group.

    A group costs its padded size plus ``pass_cost``. An optimal grouping has items of similar length together, so only cuts of the
    sorted list need to be tried.

    Returns:
        the positions in each group, ascending.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, cut = [0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        most = max(1, min(max_tokens // longest, max_items or len(order)))
        starts = range(end - 1, max(-1, end - 1 - most), -1)
        cost, start = min((best[start] + pass_cost + (end - start) * longest, start) for start in starts)
        best.append(cost)
        cut.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return groups[::-1]
