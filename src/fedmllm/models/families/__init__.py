"""What differs between families of vision-language models, one file each, found by ``config.model_type``.

A family whose file is missing is served by ``generic``, which needs no more than a processor with a chat template.
"""

from __future__ import annotations

from fedmllm.models.families.generic import ModelFamily

FAMILIES: dict[str, ModelFamily] = {}
"""Families that need more than the generic path, by ``model_type``."""

GENERIC = ModelFamily()


def family_of(model_type: str) -> ModelFamily:
    """The family for a Transformers ``model_type``."""
    return FAMILIES.get(model_type, GENERIC)
