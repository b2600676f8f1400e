"""Measure what changes to the training step that are not in the package yet would gain, alone and together."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmllm.models import parallel_adapters as stacked
from fedmllm.models.current_pass import PASS
from fedmllm.models.load import VisionLanguageModel
from gpu_stages.bench import Bench
from gpu_stages.models import adapted, build
from gpu_stages.training import Case, measure


def changes(bench: Bench) -> None:
    """Measure ten clients at 1 x 4 and 300 tokens: without changes, with equal lengths (no mask), with adapted layers as one operation without
    autocast, with norms and feed-forward layers compiled or from Liger, and with all changes."""
    vlm = adapted(build(bench, "3b"))
    case = Case(2 if bench.tiny else 10, steps=2)
    equal = replace(case, spread=0.0)
    plain = stacked._forward
    first = measure(bench, vlm, case, "as it is")
    second = measure(bench, vlm, equal, "equal lengths")
    stacked._forward = _one_operation  # type: ignore[assignment]
    single = replace(vlm, dtype=torch.float32)
    measure(bench, single, case, "one operation", first)
    measure(bench, single, equal, "one operation, equal lengths", second)
    for name, fuse in (("Liger", _liger), ("compiled", _compile)):
        try:
            reason = fuse(bench, vlm)
            if reason is None:
                stacked._forward = plain
                measure(bench, vlm, case, name, first)
                stacked._forward = _one_operation  # type: ignore[assignment]
                measure(bench, single, equal, f"{name}, one operation, equal lengths", second)
        except Exception as error:
            # This is third-party code on a device where it was never tested; the next change may still work.
            reason = f"{type(error).__name__}: {error}"[:300]
        if reason is not None:
            bench.row(name, left_out=reason)
        for module in _fused_parts(vlm):
            vars(module).pop("forward", None)


class _Adapted(torch.autograd.Function):
    """The same operation as in ``fedmllm.models.frozen_products``, in the inputs' number format and on any device."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.mT)
        y = F.linear(x, weight, bias)
        y.view(len(a), -1, y.shape[-1]).baddbmm_(low, b.mT, alpha=scale)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        dy = gradient.reshape(len(a), -1, gradient.shape[-1])
        dlow = torch.bmm(dy, b).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (gradient @ weight).view(x.shape)
            dx.view(len(a), -1, x.shape[-1]).baddbmm_(dlow, a)
        da = torch.bmm(dlow.mT, x.reshape(len(a), -1, x.shape[-1]))
        return dx, None, None, da, torch.bmm(dy.mT, low).mul_(ctx.scale), None


def _one_operation(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run an adapted layer as one operation (change A)."""
    base = layer.get_base_layer()
    if PASS.factors is None:
        return base(x, *args, **kwargs)
    a, b = PASS.factors[layer]
    return _Adapted.apply(x, base.weight, base.bias, a.to(x.dtype), b.to(x.dtype), layer.scaling["default"])


def _fused_parts(vlm: VisionLanguageModel) -> list[nn.Module]:
    """Return the decoder's norms and feed-forward layers, which contain no adapters."""
    decoder = vlm.model.get_decoder()
    return [module for module in decoder.modules() if type(module).__name__.endswith(("RMSNorm", "MLP"))]


def _liger(bench: Bench, vlm: VisionLanguageModel) -> str | None:
    """Replace norms and feed-forward layers with Liger's kernels. Return the reason if this is impossible."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if not bench.cuda:
        return "Liger's kernels need a GPU"
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2_5_vl

    apply_liger_kernel_to_qwen2_5_vl(rope=False, fused_linear_cross_entropy=False, model=vlm.model.get_base_model())
    return None


def _compile(bench: Bench, vlm: VisionLanguageModel) -> str | None:
    """Compile the forward of norms and feed-forward layers, once per class. The tiny run only traces them."""
    compiled: dict[type, Any] = {}
    for module in _fused_parts(vlm):
        kind = type(module)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, backend="eager" if bench.tiny else "inductor", dynamic=True)
        module.forward = MethodType(compiled[kind], module)  # type: ignore[method-assign]
    return None
