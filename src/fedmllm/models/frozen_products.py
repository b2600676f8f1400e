"""Computes products with frozen matrices through oneDNN on a CPU.

PyTorch's float32 products use MKL, which leaves half of the vector unit idle on some processors. On an AMD processor with AVX-512,
oneDNN is twice as fast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ROWS = 16
"""Minimum number of rows. Smaller products are limited by memory bandwidth, and MKL has less overhead."""


def available() -> bool:
    """Return whether oneDNN can help on this machine: it needs AVX-512 and a PyTorch build with oneDNN."""
    vectors = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return vectors and built and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def direct(model: nn.Module) -> None:
    """Make a model's linear layers, including those under adapters, compute through oneDNN. Results agree to float tolerance.

    This affects only ``y = W x + bias`` in float32 on a CPU with frozen W. All other cases are computed as before.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = _Forward(module)  # type: ignore[assignment, method-assign]


class _Forward:
    """A layer's ``forward`` that uses oneDNN for suitable inputs."""

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
    """Compute ``y_i = W x_i + bias + scale B_k A_k x_i`` for the rows of every group k, as one operation with its own gradient.

    Args:
        layer: a layer with weight W, with or without bias.
        x: shape (rows, length, inputs), ordered by group, with equally many rows per group.
        a: shape (groups, r, inputs).
        b: shape (groups, outputs, r).
        scale: LoRA's scale.

    Returns:
        shape (rows, length, outputs); None if the layer does not compute through oneDNN.
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
    """Return ``x W' + bias``, computed through oneDNN without a gradient."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """``y = x W' + bias``. W is frozen, so the backward pass computes only ``dx = dy W``."""

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
    """For each group, with ``l = x A'``: ``y = x W' + bias + s l B'``. The backward pass computes

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
    """Reshape (rows, length, width) to (groups, rows per group * length, width)."""
    return rows.reshape(len(a), -1, rows.shape[-1])
