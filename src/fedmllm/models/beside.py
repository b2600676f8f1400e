"""What a method adds to a frozen matrix that is held in few digits, beside the matrix, whose digits would swallow most of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def too_coarse(dtype: torch.dtype) -> bool:
    """Whether a number format loses much of a small change when it is added to a matrix: bfloat16 and float16, of 16 bits."""
    return torch.finfo(dtype).bits < 32


class Beside:
    """A linear layer's ``y = W x + bias`` becomes ``y = W x + C x + bias``; W stays as it is.

    C is held as ``high + low``, both in the format of W: high is C rounded, and low what that lost, rounded. In bfloat16 the sum is C to
    2^-17 of each entry, where W + C would be rounded to 2^-9 of the entries of *W*. The products run at the format's own speed.
    They are summed before anything is rounded: a small C x, added to a W x that is rounded already, mostly rounds back to it.

    Args:
        layer: with a weight W of shape (outputs, inputs), and a bias or none.
        change: C, of the same shape, in float32.

    Attributes:
        high, low: as above.
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
        """The layer as it was."""
        if self._before is None:
            del self._layer.forward
        else:
            self._layer.forward = self._before  # type: ignore[method-assign]


class _Summed(torch.autograd.Function):
    """``y = sum_i x M_i'`` and, the matrices being frozen, only ``dx = sum_i dy M_i`` in return."""

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
    """``sum_i x M_i``, the smallest matrix first: each product is added to what it is before in float32, and the sum rounded."""
    total = x @ matrices[0]
    for matrix in matrices[1:]:
        total = torch.addmm(total, x, matrix)
    return total
