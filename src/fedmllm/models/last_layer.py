"""Restricts the last decoder layer to the columns that are read, because its output for the prompt is not used."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedmllm.models.current_pass import PASS, passing

_SHORTENED: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()
"""Attention modules of shortened layers and their hooks, so that no layer is shortened twice."""
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


def shorten(model: Any) -> bool:
    """Make a Transformers model's last layer compute only the last columns, in passes that declare how many are read (``reading``).

    The keys and values of all columns are needed. The queries, the output projection and the feed-forward block are needed only for the
    last columns: their modules get just these, and zeros fill the other columns of their output.

    Returns:
        whether the last layer is known to allow this: softmax attention with separate projections.
    """
    layer = _last_layer(model)
    attention, feed_forward = getattr(layer, "self_attn", nn.Module()), getattr(layer, "mlp", nn.Module())
    if attention in _SHORTENED:
        return True
    names = {name for name, _ in attention.named_children()}
    if not _PROJECTIONS <= names <= _PROJECTIONS | {"q_norm", "k_norm", "rotary_emb"}:
        return False
    # In a mixture of experts, the router's outputs may be read as well, so its feed-forward block is not shortened.
    modules: list[Any] = [attention.q_proj, attention.o_proj, *([feed_forward] if type(feed_forward).__name__.endswith("MLP") else [])]
    hooks = [(module.register_forward_pre_hook(_cut), module.register_forward_hook(_fill)) for module in modules]
    _SHORTENED[attention] = [hook for pair in hooks for hook in pair]
    return True


def lengthen(model: Any) -> None:
    """Undo ``shorten``. Adapters that were attached before ``shorten`` must not be removed before this call."""
    for hook in _SHORTENED.pop(getattr(_last_layer(model), "self_attn", nn.Module()), []):
        hook.remove()


def _last_layer(model: Any) -> Any:
    """Return the decoder's last layer; None if it has no list of layers."""
    decoder = model.get_decoder()
    # In some models the decoder is wrapped together with its output head.
    layers: Any = getattr(decoder, "layers", None) or getattr(getattr(decoder, "model", None), "layers", ())
    return next(reversed(layers), None)


def narrow(model: Any) -> None:
    """Make a model's output head compute only the columns that are read, even if ``forward`` does not accept ``logits_to_keep``."""
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_last)


def reading(columns: int) -> AbstractContextManager[None]:
    """Declare that only the last columns of the model's output are read in this block."""
    return passing(columns=columns)


def _last(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return None if PASS.columns is None else (inputs[0][:, -PASS.columns :], *inputs[1:])


def _cut(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    PASS.length = inputs[0].shape[1]
    return _last(module, inputs)


def _fill(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    if PASS.columns is None:
        return None
    return F.pad(output, (0, 0, PASS.length - output.shape[1], 0))
