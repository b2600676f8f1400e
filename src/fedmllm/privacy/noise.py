"""Random numbers that nobody can predict: Gaussian noise, and uniform numbers for secret draws.

The experiment's seed is public: it is in ``config.yaml`` and in every task, and anyone who knows it could subtract noise that derives from it.
Noise therefore comes from a stream cipher, with a fresh key from the operating system.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from threading import Lock

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.special import ndtri

from fedmllm.types import Weights

_CHUNK = 1 << 20
"""Number of values drawn at a time, to bound memory."""


_Floats = np.ndarray[tuple[int], np.dtype[np.float64]]


class Noise:
    """A source of independent numbers. Several threads may share it.

    Uniform numbers u are ``(b + 1/2) / 2^52`` with 52 bits b of the key stream of AES-256 in counter mode; float64 holds them exactly, so that
    none is 0 or 1. A normal number is the inverse of the normal distribution function at u, and at most 8.3 in absolute value. All numbers
    come from one key stream, and no bit of it is used twice.

    Args:
        seed: derives the key, for tests. A result with such noise has no privacy guarantee. None takes a key from the operating system.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seeded = seed is not None
        key = os.urandom(32) if seed is None else seed.to_bytes(32, "big", signed=True)
        self._stream, self._lock = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor(), Lock()

    def uniform(self, count: int) -> _Floats:
        """Return independent numbers in float64, uniform in (0, 1), of shape (count,). They decide who takes part in a secret draw."""
        return _joined([self._chunk(size) for size in _sizes(count)])

    def normal(self, count: int) -> _Floats:
        """Return independent standard normal numbers in float64, of shape (count,)."""
        return _joined([np.asarray(ndtri(self._chunk(size)), dtype=np.float64) for size in _sizes(count)])

    def added(self, tensors: Mapping[str, torch.Tensor], deviation: float) -> Weights:
        """Return tensors plus independent noise of a standard deviation on every entry, in float64.

        Tensors are visited by name, so that seeded noise does not depend on their order.
        """
        found = {}
        for name in sorted(tensors):
            tensor = tensors[name].double()
            found[name] = tensor + deviation * torch.from_numpy(self.normal(tensor.numel())).reshape(tensor.shape).to(tensor.device)
        return {name: found[name] for name in tensors}

    def _chunk(self, count: int) -> _Floats:
        with self._lock:
            stream = self._stream.update(bytes(8 * count))
        bits = np.frombuffer(stream, dtype="<u8") >> np.uint64(12)
        return np.asarray((bits + 0.5) / 2.0**52, dtype=np.float64)


def _sizes(count: int) -> list[int]:
    return [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]


def _joined(chunks: list[_Floats]) -> _Floats:
    return np.concatenate(chunks) if chunks else np.empty(0)
