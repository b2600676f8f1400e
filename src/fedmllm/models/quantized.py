"""Frozen weights quantized to 4 bits with bitsandbytes, in QLoRA's format (Dettmers et al., NeurIPS 2023, arXiv 2305.14314)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from fedmllm.errors import ModelError
from fedmllm.models.families.generic import CONNECTORS

BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits per weight: each block of 64 weights shares an 8-bit scale, and 256 of these scales share a 32-bit scale."""


def four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the ``from_pretrained`` arguments that quantize all linear layers to 4 bits except the connector and the output head.

    Args:
        dtype: data type of the products.
        device: the model's device.
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
    """Check that quantized weights can run at a useful speed.

    Args:
        reason: the setting or model that requires quantized weights, for the error message.
        device: the model's device.

    Raises:
        ModelError: if the device is a CPU, or bitsandbytes is not installed.
    """
    if device.type == "cpu":
        raise ModelError(
            f"{reason} needs a GPU, but engine.device is cpu; use an unquantized model, in bfloat16 for half of float32's memory"
        )
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"{reason} needs bitsandbytes, which is not installed: pip install 'fedmllm[quantized]'")
