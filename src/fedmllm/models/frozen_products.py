"""Products with frozen matrices through oneDNN, on a CPU.

PyTorch's own float32 products go through MKL, which on some processors leaves half of the vector unit idle: on an AMD one with AVX-512,
oneDNN makes twice as many a second.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ROWS = 16
"""Products of fewer rows are bound by memory, and MKL begins sooner."""


def available() -> bool:
    """Whether there is something to gain here: AVX-512, and a build of PyTorch with oneDNN."""
    vectors = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return vectors and built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def direct(model: nn.Module) -> None:
    """Let a model's linear layers, under adapters too, compute through oneDNN, to float tolerance as before.

    Only ``y = W x + bias`` in float32 on a CPU, with W frozen, is affected; whatever else a layer comes to is computed as before.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = _Forward(module)  # type: ignore[assignment, method-assign]


class _Forward:
    """A layer's ``forward``, through oneDNN where that is for it."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        if not _suits(x, weight, bias):
            return F.linear(x, weight, bias)
        if torch.is_grad_enabled() and x.requires_grad:
            product: Tensor = _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
            return product
        return frozen_product(x, weight, bias)


def adapted(layer: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor | None:
    """``y_i = W x_i + bias + scale B_k A_k x_i`` for the rows of every group k, as one operation with one gradient.

    Args:
        layer: with W, and a bias or none.
        x: shape (rows, length, inputs), the groups' rows behind one another, as many of each.
        a: shape (groups, r, inputs).
        b: shape (groups, outputs, r).
        scale: LoRA's.

    Returns:
        shape (rows, length, outputs); None where the layer does not compute through oneDNN.
    """
    if not isinstance(layer.forward, _Forward) or a.dtype != torch.float32 or not _suits(x, layer.weight, layer.bias):
        return None
    product: Tensor = _Adapted.apply(x, layer.weight, layer.bias, a, b, scale)  # type: ignore[no-untyped-call]
    return product


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    return frozen and plain and x.numel() >= _ROWS * x.shape[-1] and not torch.is_autocast_enabled("cpu")


def frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W' + bias`` through oneDNN, without a gradient."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """``y = x W' + bias`` and, W being frozen, only ``dx = dy W`` in return."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return frozen_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return frozen_product(gradient, weight.t(), None), None, None


class _Adapted(torch.autograd.Function):
    """By group, with ``l = x A'``: ``y = x W' + bias + s l B'``; in return

    ``dl = s dy B``, ``dx = dy W + dl A``, ``dA = dl' x``, ``dB = s dy' l``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = torch.bmm(_grouped(x, a), a.mT)
        y = frozen_product(x, weight, bias)
        _grouped(y, a).baddbmm_(low, b.mT, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        dy, dx, da, db = _grouped(gradient, a), None, None, None
        dlow = torch.bmm(dy, b).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            dx = frozen_product(gradient, weight.t(), None)
            _grouped(dx, a).baddbmm_(dlow, a)
        if ctx.needs_input_grad[3]:
            da = torch.bmm(dlow.mT, _grouped(x, a))
        if ctx.needs_input_grad[4]:
            db = torch.bmm(dy.mT, low).mul_(ctx.scale)
        return dx, None, None, da, db, None


def _grouped(rows: Tensor, a: Tensor) -> Tensor:
    """(rows, length, width) as (groups, rows of each behind one another, width)."""
    return rows.reshape(len(a), -1, rows.shape[-1])
