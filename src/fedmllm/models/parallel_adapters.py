"""Several adapters on one model at once: each row of a batch goes through the adapter of its client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """Whether clients can go through a model side by side: all that trains are factors in the decoder, to which a batch comes row by row."""
    inside = decoder_modules(model)
    layers = all(id(layer) in inside for _, layer in adapted_layers(model))
    return layers and not factors.others(dict(trainable(model)))


@contextmanager
def side_by_side(model: nn.Module) -> Iterator[dict[str, Any]]:
    """In this block the adapters of a PEFT model are off, and passes may be ``stacked``, in several threads at once.

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
    """In this block every adapted layer computes for a row x_i of client k

        y_i = W x_i + (alpha / r) B_k A_k x_i

    in one product of all rows with W and two batched ones with the clients' factors. Gradients reach each client's own factors and
    are the same sums as when clients run one after another.

    Args:
        layers: from ``side_by_side``.
        members: each client's tensors, named as in a PEFT file, all of the same shapes.
        counts: how many rows of a batch are the first client's, the second's, and so on, in this order.
    """
    rows = None if len(set(counts)) == 1 else torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    by_layer = {
        layer: (_by_row([m[f"{name}.lora_A.weight"] for m in members], rows), _by_row([m[f"{name}.lora_B.weight"] for m in members], rows))
        for name, layer in layers.items()
    }
    with passing(factors=by_layer):
        yield


def _by_row(tensors: Sequence[Tensor], rows: Tensor | None) -> Tensor:
    """The clients' factors side by side; one per row where clients have different numbers of rows."""
    whole = torch.stack(list(tensors))
    return whole if rows is None else whole[rows.to(whole.device)]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's product with its frozen matrix, and what the clients' adapters add to it."""
    base = layer.get_base_layer()
    if PASS.factors is None:
        frozen: Tensor = base(x, *args, **kwargs)
        return frozen
    a, b = PASS.factors[layer]
    whole = adapted(base, x, a, b, layer.scaling["default"])
    return _with_low_rank(base(x, *args, **kwargs), x, a, b, layer.scaling["default"]) if whole is None else whole


def _with_low_rank(frozen: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """In the adapters' number format, whatever the frozen matrix is held in."""
    low = torch.bmm(x.to(a.dtype).reshape(len(a), -1, x.shape[-1]), a.mT)
    grouped = frozen.reshape(len(b), -1, frozen.shape[-1]).to(low.dtype)
    return torch.baddbmm(grouped, low, b.to(low.dtype).mT, alpha=scale).reshape(frozen.shape).to(frozen.dtype)
