"""Gradient checkpointing (Chen et al., 2016, arXiv 1604.06174): layers computed again in the backward pass, as they were the first time."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fedmllm.errors import ModelError
from fedmllm.models.current_pass import PASS, passing


def checkpoint_layers(model: Any, name: str) -> None:
    """Let a Transformers model keep only the inputs of its layers in training.

    A layer computed again, on a GPU in another thread, must go through the same clients' adapters and leave out the same columns as the
    first time: what held then is taken along.

    Raises:
        ModelError: if the model cannot do that.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(f"model.gradient_checkpointing: {name!r} does not support it; leave it out")
    # Older versions of Transformers know the second name only.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": _contexts})


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Nothing for the first pass, and for the second what holds now."""
    return nullcontext(), passing(factors=PASS.factors, columns=PASS.columns)
