"""Several adapters on one model at once: each row of a batch goes through the adapter of its client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedmllm.models.lora import adapted_layers


@contextmanager
def stacked(model: nn.Module, members: Sequence[Mapping[str, Tensor]], counts: Sequence[int]) -> Iterator[None]:
    """In this block the model computes, in every adapted layer and for a row x_i of client k,

        y_i = W x_i + (alpha / r) B_k A_k x_i

    in one product of all rows with W and two batched ones with the clients' factors. Gradients reach each client's own factors and
    are the same sums as when clients run one after another.

    Args:
        model: a PEFT model; what its own adapter holds plays no part.
        members: each client's tensors, named as in a PEFT file, all of the same shapes.
        counts: how many rows of a batch are the first client's, the second's, and so on, in this order.
    """
    layers = list(adapted_layers(model))
    rows = None if len(set(counts)) == 1 else torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    for name, layer in layers:
        a, b = (_by_row([member[f"{name}.lora_{factor}.weight"] for member in members], rows) for factor in "AB")
        layer.forward = _forward(layer, a, b)
    try:
        yield
    finally:
        for _, layer in layers:
            del layer.forward


def _by_row(tensors: Sequence[Tensor], rows: Tensor | None) -> Tensor:
    """The clients' factors side by side; one per row where clients have different numbers of rows."""
    whole = torch.stack(list(tensors))
    return whole if rows is None else whole[rows.to(whole.device)]


def _forward(layer: Any, a: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
    """A layer's function; ``a`` of shape (groups, r, inputs), ``b`` of shape (groups, outputs, r), rows in equal groups."""
    scale: float = layer.scaling["default"]

    def forward(x: Tensor) -> Tensor:
        frozen: Tensor = layer.get_base_layer()(x)
        low = torch.bmm(x.to(a.dtype).reshape(len(a), -1, x.shape[-1]), a.mT)
        added: Tensor = scale * torch.bmm(low, b.mT)
        return frozen + added.reshape(frozen.shape).to(frozen.dtype)

    return forward
