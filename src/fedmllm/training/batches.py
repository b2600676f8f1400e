"""Samples to optimizer steps: encoding with a cache, order, micro-batches and their weights in the loss."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor

from fedmllm.data.fingerprint import prompt_key
from fedmllm.data.prompts import Wording, target, to_messages, wording
from fedmllm.errors import DataError, ModelError
from fedmllm.models.encoding import Batch, Encoded, collate, encode, option_tokens
from fedmllm.models.load import VisionLanguageModel
from fedmllm.types import Message, Sample


class Encoder:
    """Samples as tensors, kept for the next time up to a limit of memory, the least recently used leaving first.

    They are kept by what they are made of: prompt, pictures and answer (``data.fingerprint.prompt_key``). Splits, scenarios and data sets can
    therefore share an encoder, whatever they have done to a sample of the same id. The key of a sample is made once for as long as it lives.

    Where the model keeps features of pictures (``vlm.features``) they are computed here, and pixels, nearly all of a sample's memory, are dropped.

    Args:
        vlm: the model to encode for.
        style: the wording of the prompts, or the name of one that is built in.
        max_bytes: memory for kept samples.
    """

    def __init__(self, vlm: VisionLanguageModel, style: str | Wording, max_bytes: int = 1 << 30) -> None:
        self._vlm, self._wording, self._max_bytes = vlm, wording(style), max_bytes
        self._kept: OrderedDict[bytes, Encoded] = OrderedDict()
        self._bytes = 0
        self._keys: dict[int, tuple[ReferenceType[Sample], bytes]] = {}

    def __call__(self, sample: Sample) -> Encoded:
        """The sample's prompt and target as tensors.

        Raises:
            ModelError, DataError: naming the sample that cannot be had as tensors.
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
        """Remembered by the object's identity: what it holds is not hashed again in every round."""
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
                # What no answer could be read of is found here, not when the first one is asked for.
                option_tokens(self._vlm, sample)
            return encode(self._vlm, messages, answer)


@contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    """Errors in this block say which sample they are about."""
    try:
        yield
    except (ModelError, DataError) as error:
        raise type(error)(f"sample {sample.id}: {error}") from error


def _size(encoded: Encoded) -> int:
    return encoded.input_ids.nbytes + sum(tensor.nbytes for tensor in (*encoded.extras.values(), *encoded.by_token.values()))


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step, by micro-batch."""

    micro_batches: tuple[tuple[Encoded, ...], ...]

    @property
    def samples(self) -> list[Encoded]:
        """All samples in order."""
        return [sample for micro in self.micro_batches for sample in micro]


def steps(samples: Sequence[Encoded], batch_size: int, accumulation: int, rng: np.random.Generator) -> Iterator[Step]:
    """One epoch in random order: ``accumulation`` micro-batches of ``batch_size`` samples a step, the last one shorter."""
    order = rng.permutation(len(samples))
    micro = [tuple(samples[i] for i in order[k : k + batch_size]) for k in range(0, len(order), batch_size)]
    for first in range(0, len(micro), accumulation):
        yield Step(tuple(micro[first : first + accumulation]))


def loss_weights(step: Step) -> list[float]:
    """The weight of each sample's answer tokens in the step's loss, in the step's order.

    Accumulation averages over micro-batches the mean over each one's M_m answer tokens, so that a token of micro-batch m
    weighs 1 / (number of micro-batches * M_m). With these weights the micro-batches can run together or one by one.
    """
    tokens = [sum(sample.answer_length for sample in micro) for micro in step.micro_batches]
    return [1 / (len(tokens) * count) for count, micro in zip(tokens, step.micro_batches, strict=True) for _ in micro]


PASS_COST = {"cpu": 128}
"""What a pass of the model costs beside its tokens, in tokens, by kind of device; elsewhere as much as the largest batch."""


def passes(vlm: VisionLanguageModel, parts: Sequence[Step], max_tokens: int) -> Iterator[tuple[Batch, Tensor, list[int]]]:
    """Steps of several clients as few padded batches as fit into ``max_tokens``, or more if that saves padding.

    Returns:
        each batch, its samples' loss weights, shape (samples, 1), and to which part each sample belongs, in ascending order.
    """
    samples = [sample for part in parts for sample in part.samples]
    weights = [weight for part in parts for weight in loss_weights(part)]
    owners = [k for k, part in enumerate(parts) for _ in part.samples]
    for group in batched(vlm, samples, max_tokens):
        batch = collate(vlm, [samples[i] for i in group])
        yield batch, torch.tensor([[weights[i]] for i in group], device=vlm.device), [owners[i] for i in group]


def batched(vlm: VisionLanguageModel, samples: Sequence[Encoded], max_tokens: int) -> list[list[int]]:
    """Positions of samples that go through the model together, cheapest for its device."""
    return pack([len(sample.input_ids) for sample in samples], max_tokens, PASS_COST.get(vlm.device.type, max_tokens))


def pack(lengths: Sequence[int], max_tokens: int, pass_cost: int) -> list[list[int]]:
    """The cheapest groups whose padded size (items x longest) stays within ``max_tokens``; a longer item stands alone.

    A group costs its padded size and ``pass_cost``. In an optimal division items of like length stand together, so that only
    cuts of the sorted list need be tried.

    Returns:
        positions, ascending within each group.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, cut = [0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        starts = range(end - 1, max(-1, end - 1 - max(1, max_tokens // longest)), -1)
        cost, start = min((best[start] + pass_cost + (end - start) * longest, start) for start in starts)
        best.append(cost)
        cut.append(start)
    groups, end = [], len(order)
    while end:
        groups.append(sorted(order[cut[end] : end]))
        end = cut[end]
    return groups[::-1]
