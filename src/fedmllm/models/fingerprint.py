"""Computes a model's fingerprint, a short hash of its settings and weights that does not depend on the folder's name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_VALUES = 256
"""Number of values of each tensor's first row that enter the fingerprint. Training changes nearly all values, so these suffice."""
_ABOUT_FILES = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Settings that describe how a model was saved and not what it computes."""


def fingerprint(source: str, revision: str | None) -> str:
    """Return 16 hex digits of ``SHA-256(settings, and each tensor's name, shape and first values in bfloat16)``.

    A copy has the same fingerprint, even if it is saved in bfloat16 or split into different files. A model that was trained further, or
    that an adapter was merged into, has a different one.

    Args:
        source: the argument of ``from_pretrained``. Files of a hub model are downloaded.
        revision: the revision on the hub.

    Raises:
        OSError: if files are missing or cannot be downloaded.
        ValueError, KeyError, SafetensorError: if files are damaged.
    """
    digest = hashlib.sha256(json.dumps(_plain(_json(_file(source, "config.json", revision))), sort_keys=True).encode())
    for _, entry in sorted(entry for path in _weights(source, revision) for entry in _entries(path)):
        digest.update(entry)
    return digest.hexdigest()[:16]


def _plain(settings: Any) -> Any:
    """Remove the settings in ``_ABOUT_FILES``, at any depth."""
    if isinstance(settings, list):
        return [_plain(value) for value in settings]
    if not isinstance(settings, dict):
        return settings
    return {key: _plain(value) for key, value in settings.items() if key not in _ABOUT_FILES}


def _weights(source: str, revision: str | None) -> list[Path]:
    """Return the weight files that Transformers reads: a single one, or those listed in an index."""
    single, index = "model.safetensors", "model.safetensors.index.json"
    if (found := _file(source, single, revision, optional=True)) is not None:
        return [found]
    names = sorted(set(_json(_file(source, index, revision))["weight_map"].values()))
    return [path for name in names if (path := _file(source, name, revision)) is not None]


def _file(source: str, name: str, revision: str | None, optional: bool = False) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=not optional)
    return None if found is None else Path(found)


def _json(path: Path | None) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path else {}


def _entries(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each tensor's name, and the bytes that enter the fingerprint."""
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is not a mapping
            shape = file.get_slice(name).get_shape()
            first = (*(slice(0, 1) for _ in shape[1:]), slice(0, _VALUES))
            values = file.get_slice(name)[first] if shape else file.get_tensor(name)
            held = values.to(torch.bfloat16) if values.is_floating_point() else values
            yield name, f"{name} {shape}".encode() + held.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
