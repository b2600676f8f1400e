"""What differs between families of vision-language models, one file each, found by ``config.model_type``.

A family whose file is missing is served by ``generic``, which needs no more than a processor with a chat template.
"""

from __future__ import annotations

from fedmllm.models.families.generic import ModelFamily
from fedmllm.models.families.idefics3 import Idefics3
from fedmllm.models.families.minicpmv4_6 import MiniCPMV46
from fedmllm.models.families.paligemma import PaliGemma

FAMILIES: dict[str, ModelFamily] = {"idefics3": Idefics3(), "smolvlm": Idefics3(), "minicpmv4_6": MiniCPMV46(), "paligemma": PaliGemma()}
"""Families that need more than the generic path, by ``model_type``."""

GENERIC = ModelFamily()


def family_of(model_type: str) -> ModelFamily:
    """The family for a Transformers ``model_type``."""
    return FAMILIES.get(model_type, GENERIC)
