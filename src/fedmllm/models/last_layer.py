"""The last decoder layer where its output is read: nobody looks at what it makes of the prompt."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedmllm.models.current_pass import PASS, passing

_SHORTENED: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()
"""Attentions of the layers that are, and the hooks: a second time would cut what is cut."""
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


def shorten(model: Any) -> bool:
    """Let a Transformers model's last layer work on the last columns only, in passes that say how many are read (``reading``).

    The keys and values of all columns are needed; queries, what follows attention and the feed-forward part are not. Their modules
    are handed the last columns, and zeros stand for the others.

    Returns:
        whether the last layer is one that this is known to be right for: softmax attention with separate projections.
    """
    layer = _last_layer(model)
    attention, feed_forward = getattr(layer, "self_attn", nn.Module()), getattr(layer, "mlp", nn.Module())
    if attention in _SHORTENED:
        return True
    names = {name for name, _ in attention.named_children()}
    if not _PROJECTIONS <= names <= _PROJECTIONS | {"q_norm", "k_norm", "rotary_emb"}:
        return False
    # Of a mixture of experts the router's numbers may be read too.
    modules: list[Any] = [attention.q_proj, attention.o_proj, *([feed_forward] if type(feed_forward).__name__.endswith("MLP") else [])]
    hooks = [(module.register_forward_pre_hook(_cut), module.register_forward_hook(_fill)) for module in modules]
    _SHORTENED[attention] = [hook for pair in hooks for hook in pair]
    return True


def lengthen(model: Any) -> None:
    """Undo ``shorten``, if it was done; to be called before adapters come off that were there when it was."""
    for hook in _SHORTENED.pop(getattr(_last_layer(model), "self_attn", nn.Module()), []):
        hook.remove()


def _last_layer(model: Any) -> Any:
    """Of the decoder; None if it has no list of layers."""
    decoder = model.get_decoder()
    # Some models' decoder comes with its output head around it.
    layers: Any = getattr(decoder, "layers", None) or getattr(getattr(decoder, "model", None), "layers", ())
    return next(reversed(layers), None)


def narrow(model: Any) -> None:
    """Let a model's output head work on the columns that are read, also where ``forward`` takes no ``logits_to_keep``."""
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_last)


def reading(columns: int) -> AbstractContextManager[None]:
    """In this block only the last columns of the model's output are read."""
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
