"""Gradient checkpointing (Chen et al., 2016, arXiv 1604.06174): layers are recomputed in the backward pass under the same conditions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fedmllm.errors import ModelError
from fedmllm.models.current_pass import PASS, passing


def checkpoint_layers(model: Any, name: str) -> None:
    """Make a Transformers model store only the inputs of its layers in training.

    A recomputed layer must use the same clients' adapters and skip the same columns as in the forward pass. On a GPU, recomputation runs
    in another thread, so these settings are captured in the forward pass.

    Args:
        model: the Transformers model.
        name: the model's name, for the error message.

    Raises:
        ModelError: if the model does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ModelError(f"model.gradient_checkpointing: {name!r} does not support it; set it to false")
    # Older versions of Transformers have only the second name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": _contexts})


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward pass and of recomputation, which restores the current settings."""
    return nullcontext(), passing(factors=PASS.factors, columns=PASS.columns)
