"""Frozen weights in 4 bits: QLoRA's format (Dettmers et al., NeurIPS 2023, arXiv 2305.14314), by bitsandbytes."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from fedmllm.errors import ModelError
from fedmllm.models.families.generic import CONNECTORS

BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Per weight: blocks of 64 share a scale of 8 bits, 256 of these one of 32."""


def four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` takes for a model whose linear layers are held in 4 bits, but for the connector and the output head.

    Args:
        dtype: in which products are computed.
        device: where the model is put.
    """
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", rf"(.*\.)?({'|'.join(sorted(CONNECTORS))})"],
    )
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def require_gpu(reason: str, device: torch.device) -> None:
    """Refuse weights in few bits where nothing computes with them at a useful speed.

    Args:
        reason: which setting or model asks for them.
        device: where they are to be.

    Raises:
        ModelError: if the device is no GPU, or bitsandbytes is not installed.
    """
    if device.type == "cpu":
        raise ModelError(f"{reason} needs a GPU, engine.device is cpu; use an unquantized model, in bfloat16 for half of float32's memory")
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"{reason} needs bitsandbytes, which is not installed: pip install 'fedmllm[quantized]'")
