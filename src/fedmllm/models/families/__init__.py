"""What differs between families of vision-language models. Each family has its own file and is found by ``config.model_type``.

All other model types use ``generic``, which needs only a processor with a chat template.
"""

from __future__ import annotations

from fedmllm.models.families.generic import ModelFamily
from fedmllm.models.families.idefics3 import Idefics3
from fedmllm.models.families.llava_onevision import LlavaOneVision
from fedmllm.models.families.minicpmv import MiniCPMV
from fedmllm.models.families.minicpmv4_6 import MiniCPMV46
from fedmllm.models.families.paligemma import PaliGemma
from fedmllm.registry import index

FAMILIES: dict[str, ModelFamily] = index(
    "family",
    {
        **{"idefics3": Idefics3(), "smolvlm": Idefics3(), "llava_onevision": LlavaOneVision()},
        **{"minicpmv": MiniCPMV(), "minicpmv4_6": MiniCPMV46(), "paligemma": PaliGemma()},
    },
)
"""Families that need more than the generic path, by ``model_type``."""

GENERIC = ModelFamily()

TESTED: dict[str, str] = {
    "llava": "LLaVA 1.5; the embedded nano",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL 3 and 3.5",
    "gemma3": "Gemma 3",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM (needs num2words)",
    "minicpmv": "MiniCPM-V 2.6, MiniCPM-Llama3-V 2.5 (remote code)",
    "minicpmv4_6": "MiniCPM-V 4.6",
    "paligemma": "PaliGemma 1 and 2",
}
"""The values of ``model_type`` that the contract tests cover, and the models of each type."""


def family_of(model_type: str) -> ModelFamily:
    """Return the family for a Transformers ``model_type``."""
    return FAMILIES.get(model_type, GENERIC)
