"""The byte format of checkpoints and messages: groups of tensors and some facts. It is safetensors, so that reading never runs code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from fedmllm.types import Record, Slots, Weights

_HEADER = "fedmllm"
"""The safetensors metadata key that holds the facts."""


def pack(groups: Slots, facts: Mapping[str, Any]) -> bytes:
    """Write tensors under ``group/name`` with their dtypes, and facts as JSON. Group names must not contain a slash."""
    tensors = {f"{group}/{name}": t.contiguous() for group, weights in groups.items() for name, t in weights.items()}
    return bytes(save(tensors, {_HEADER: json.dumps(facts, allow_nan=False)}))


def unpack(content: bytes) -> tuple[dict[str, Weights], Record]:
    """Return the groups of tensors, and the facts.

    Raises:
        ValueError: if the bytes are not in this format.
    """
    groups: dict[str, Weights] = {}
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        facts = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][_HEADER])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not safetensors written by fedmllm ({type(error).__name__}: {error})") from error
    if not isinstance(facts, dict):
        raise ValueError(f"the facts must be a mapping, got {type(facts).__name__}")
    # Sorted, so that the order does not depend on the writer: norms and clipping sum over tensors, and rounding depends on the order.
    for key, tensor in sorted(tensors.items()):
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups, facts
