"""How the gradients of single samples are computed: in one pass with a copy of the adapters for each row, or one sample after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import has_dropout
from fedmllm.models.parallel_adapters import grouped, stackable
from fedmllm.randomness import torch_randomness
from fedmllm.training.client import ClientTraining, Route
from fedmllm.training.private import SecretNoise
from fedmllm.types import Weights


def separable(vlm: VisionLanguageModel) -> bool:
    """Return whether each row of a pass can have its own adapters. Dropout would make a row's gradient depend on the other rows."""
    return stackable(vlm.model) and not has_dropout(vlm.model)


def rows_apart(layers: Mapping[str, Any], max_rows: int) -> Route:
    """Return a route in which every row goes through its own copy of its client's adapters. The copy's gradient is that of the row's sample.

    Args:
        layers: the layers from ``parallel_adapters``.
        max_rows: number of rows whose copies fit into memory.
    """

    @contextmanager
    def adapters(trainings: Sequence[ClientTraining], counts: Sequence[int]) -> Iterator[None]:
        own = _row_copies([training.weights for training in trainings], counts)
        with grouped(layers, own):
            yield
        gradients = {name: tensor.grad for name, tensor in own.items() if tensor.grad is not None}
        for training, (first, end) in zip(trainings, pairwise(accumulate(counts, initial=0)), strict=True):
            training.add_samples({name: gradient[first:end] for name, gradient in gradients.items()})

    return Route(adapters, max_rows)


def one_by_one(vlm: VisionLanguageModel, noise: SecretNoise) -> Route:
    """Return a route of one sample at a time through the model's own tensors, for models that are not ``separable``.

    Dropout gets a new secret seed for each sample. With the experiment's seed, a sample would shift the random numbers of those after it.
    """

    @contextmanager
    def adapters(trainings: Sequence[ClientTraining], counts: Sequence[int]) -> Iterator[None]:
        with torch_randomness(vlm.device, int(noise.uniform(1)[0] * 2**52), "dropout"):
            yield
        for training in trainings:
            training.add_own_gradient()

    return Route(adapters, max_rows=1)


def _row_copies(clients: Sequence[Weights], counts: Sequence[int]) -> Weights:
    """Return each client's tensors once for each of its rows, of shape (rows, ...). Those that train are leaves that require gradients."""
    copies = {}
    for name in clients[0]:
        tensors = [weights[name] for weights in clients]
        rows = torch.cat([_repeated(tensor, count) for tensor, count in zip(tensors, counts, strict=True)])
        copies[name] = rows.requires_grad_(any(tensor.requires_grad for tensor in tensors))
    return copies


def _repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor.detach().expand(count, *tensor.shape)
