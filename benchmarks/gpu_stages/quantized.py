"""Quantize a model's frozen weights to 4 bits without a checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedmllm.models.load import VisionLanguageModel


def in_four_bits(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """Convert the decoder's linear layers to the format of ``fedmllm.models.quantized``, in place."""
    import bitsandbytes

    for module in list(vlm.model.get_decoder().modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, _quantized(bitsandbytes.nn, layer, vlm))
    # PEFT reads the kind of layers from this attribute.
    vlm.model.is_loaded_in_4bit = True
    return vlm


def _quantized(bnb: Any, layer: nn.Linear, vlm: VisionLanguageModel) -> nn.Module:
    new = bnb.Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=vlm.dtype, quant_type="nf4", device="meta"
    )
    weight = layer.weight.detach().cpu() if vlm.device.type == "cpu" else layer.weight.detach()
    new.weight = bnb.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4")
    new.bias = layer.bias
    moved: nn.Module = new.to(vlm.device)
    return moved
