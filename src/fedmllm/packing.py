"""Groups of tensors and a few facts as bytes: one form for checkpoints and for messages. It is safetensors, so reading runs nobody's code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedmllm.types import Record, Slots, Weights

_HEADER = "fedmllm"
"""The facts' place in the metadata of safetensors."""


def pack(groups: Slots, facts: Mapping[str, Any]) -> bytes:
    """Tensors under ``group/name``, their dtypes kept, and facts as JSON. No group's name has a slash in it."""
    tensors = {f"{group}/{name}": t.contiguous() for group, weights in groups.items() for name, t in weights.items()}
    return bytes(save(tensors, {_HEADER: json.dumps(facts, allow_nan=False)}))


def unpack(content: bytes) -> tuple[dict[str, Weights], Record]:
    """The groups, and the facts.

    Raises:
        ValueError: if the bytes are not of this form.
    """
    groups: dict[str, Weights] = {}
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        facts = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][_HEADER])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"no safetensors of ours ({type(error).__name__}: {error})") from error
    if not isinstance(facts, dict):
        raise ValueError(f"the facts are a {type(facts).__name__}, no mapping")
    # In one order, whatever was written first: norms and clipping sum over tensors, and rounding depends on their order.
    for key, tensor in sorted(tensors.items()):
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups, facts
