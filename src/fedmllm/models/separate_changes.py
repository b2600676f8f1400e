"""Holds a method's change to a low-precision frozen matrix separately, because adding it to the matrix would round most of it away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def too_coarse(dtype: torch.dtype) -> bool:
    """Return whether a data type is too coarse to add a small change to a matrix. This is true for 16-bit types."""
    return torch.finfo(dtype).bits < 32


class SeparateChange:
    """Changes a linear layer from ``y = W x + bias`` to ``y = W x + C x + bias`` without modifying W.

    C is held as ``high + low``, both in the data type of W: high is C rounded, and low is the rounded remainder. In bfloat16 the sum
    represents each entry of C to a relative precision of 2^-17, whereas W + C would be rounded to 2^-9 of the entries of *W*. The products
    run at the speed of that data type. They are summed before rounding, because a small C x added to a rounded W x would mostly be lost.

    Args:
        layer: a layer with weight W of shape (outputs, inputs), with or without bias.
        change: C, with the same shape, in float32.

    Attributes:
        high, low: the two terms of C.
    """

    def __init__(self, layer: nn.Linear, change: Tensor) -> None:
        weight = layer.weight
        self.high = change.to(weight.device, weight.dtype)
        self.low = (change.to(weight.device) - self.high.float()).to(weight.dtype)
        self._layer, self._before = layer, vars(layer).get("forward")
        layer.forward = self._forward  # type: ignore[method-assign, assignment]

    def _forward(self, x: Tensor) -> Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
        product: Tensor = _Summed.apply(rows, self.low, self.high, weight)  # type: ignore[no-untyped-call]
        return (product if bias is None else product + bias).reshape(*x.shape[:-1], -1)

    def remove(self) -> None:
        """Restore the layer."""
        if self._before is None:
            del self._layer.forward
        else:
            self._layer.forward = self._before  # type: ignore[method-assign]


class _Summed(torch.autograd.Function):
    """``y = sum_i x M_i'``. The matrices are frozen, so the backward pass computes only ``dx = sum_i dy M_i``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *matrices: Tensor) -> Tensor:
        ctx.save_for_backward(*matrices)
        return _summed(x, [matrix.t() for matrix in matrices])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        matrices = ctx.saved_tensors
        return (_summed(gradient, matrices), *(None for _ in matrices))


def _summed(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Return ``sum_i x M_i``, smallest matrix first. Each product is added to the previous sum in float32 and then rounded."""
    total = x @ matrices[0]
    for matrix in matrices[1:]:
        total = torch.addmm(total, x, matrix)
    return total
