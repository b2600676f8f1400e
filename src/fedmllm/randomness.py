"""Random numbers without global state. Every generator depends only on ``(seed, purpose, keys)``.

Two runs with the same seed therefore draw the same numbers, regardless of what else is drawn, in which order clients train,
and where they run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, purpose: str, *keys: str | int) -> int:
    """Return a 63-bit seed: the first bits of ``SHA-256(seed / purpose / keys)``.

    Args:
        seed: the experiment's seed.
        purpose: what the numbers are used for, e.g. ``"cohort"``. Different purposes never share a stream.
        keys: distinguish draws with the same purpose, e.g. round number and client id.
    """
    text = "/".join([str(seed), purpose, *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def uniform(seed: int, purpose: str, *keys: str | int) -> float:
    """Return one number in [0, 1) for ``(seed, purpose, keys)``. For one draw per sample this is ten times faster than a generator."""
    return (derive_seed(seed, purpose, *keys) >> 10) / 2**53


def generator(seed: int, purpose: str, *keys: str | int) -> np.random.Generator:
    """Return a new NumPy generator for ``(seed, purpose, keys)``."""
    return np.random.default_rng(derive_seed(seed, purpose, *keys))


@contextmanager
def torch_randomness(device: torch.device, seed: int, purpose: str, *keys: str | int) -> Iterator[None]:
    """Seed PyTorch from ``(seed, purpose, keys)`` for the code in this block (dropout, LoRA initialization).

    PyTorch's layers only use its global generators. They are seeded here, and their previous state is restored when the block ends.
    """
    import torch

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.random.manual_seed(derive_seed(seed, purpose, *keys))
        yield
