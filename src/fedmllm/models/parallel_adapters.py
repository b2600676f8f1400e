"""Runs several clients' adapters on one model: each row of a batch goes through its client's adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedmllm import factors
from fedmllm.models.current_pass import PASS, passing
from fedmllm.models.families.generic import decoder_modules
from fedmllm.models.frozen_products import adapted
from fedmllm.models.lora import adapted_layers, trainable


def stackable(model: Any) -> bool:
    """Return whether parallel clients can share a model's passes. Only LoRA factors in the decoder may train, because there each row of a
    batch belongs to one client."""
    inside = decoder_modules(model)
    layers = all(id(layer) in inside for _, layer in adapted_layers(model))
    return layers and not factors.others(dict(trainable(model)))


@contextmanager
def parallel_adapters(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Disable a PEFT model's own adapters in this block, so that passes can be ``stacked``, also in several threads at once.

    Yields:
        the adapted layers by name.
    """
    layers = dict(adapted_layers(model))
    for layer in layers.values():
        layer.forward = partial(_forward, layer)
    try:
        yield layers
    finally:
        for layer in layers.values():
            del layer.forward


@contextmanager
def stacked(layers: Mapping[str, Any], members: Sequence[Mapping[str, Tensor]], counts: Sequence[int]) -> Iterator[None]:
    """Make every adapted layer in this block compute, for a row x_i of client k,

        y_i = W x_i + (alpha / r) B_k A_k x_i

    with one product of all rows with W and two batched products with the clients' factors. Each client's factors get the same gradient
    as if the clients ran one after another.

    Args:
        layers: the layers from ``parallel_adapters``.
        members: each client's tensors, named as in a PEFT file, with equal shapes for all clients.
        counts: each client's number of rows in a batch. Rows are ordered by client.
    """
    rows = None if len(set(counts)) == 1 else torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    names = [f"{name}.lora_{letter}.weight" for name in layers for letter in "AB"]
    with grouped(layers, {name: _by_row([member[name] for member in members], rows) for name in names}):
        yield


def grouped(layers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Return a context in which the rows of a batch, in equally large groups, go through the factors of their group.

    Args:
        layers: the layers from ``parallel_adapters``.
        tensors: the factors of all groups, of shape (groups, ...), named as in a PEFT file.
    """
    factors = {layer: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name, layer in layers.items()}
    return passing(factors=factors)


def _by_row(tensors: Sequence[Tensor], rows: Tensor | None) -> Tensor:
    """Stack the clients' factors: one per client, or one per row if clients have different numbers of rows."""
    whole = torch.stack(list(tensors))
    return whole if rows is None else whole[rows.to(whole.device)]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a layer's product with its frozen matrix plus the clients' adapters."""
    base = layer.get_base_layer()
    if PASS.factors is None:
        frozen: Tensor = base(x, *args, **kwargs)
        return frozen
    a, b = PASS.factors[layer]
    whole = adapted(base, x, a, b, layer.scaling["default"])
    return _with_low_rank(base(x, *args, **kwargs), x, a, b, layer.scaling["default"]) if whole is None else whole


def _with_low_rank(frozen: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Add the low-rank products, computed in the adapters' data type, to the product with the frozen matrix."""
    low = torch.bmm(x.to(a.dtype).reshape(len(a), -1, x.shape[-1]), a.mT)
    grouped = frozen.reshape(len(b), -1, frozen.shape[-1]).to(low.dtype)
    return torch.baddbmm(grouped, low, b.to(low.dtype).mT, alpha=scale).reshape(frozen.shape).to(frozen.dtype)
