"""Gaussian noise that nobody can predict.

The experiment's seed is public: it is in ``config.yaml`` and in every task, and anyone who knows it could subtract noise that derives from it.
Noise therefore comes from a stream cipher, with a fresh key from the operating system.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.special import ndtri

from fedmllm.types import Weights

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

_CHUNK = 1 << 20
"""Number of values drawn at a time, to bound memory."""


class Noise:
    """A source of independent normal numbers.

    Uniform numbers u are ``(b + 1/2) / 2^53`` with 53 bits b of the key stream of AES-256 in counter mode; a normal number is the inverse of
    the normal distribution function at u. Numbers are float64 and at most 8.3 in absolute value.

    Args:
        seed: derives the key, for tests. A result with such noise has no privacy guarantee. None takes a key from the operating system.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seeded = seed is not None
        key = os.urandom(32) if seed is None else seed.to_bytes(32, "big", signed=True)
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def normal(self, count: int) -> Floats:
        """Return independent standard normal numbers in float64, of shape (count,)."""
        chunks = [ndtri(self.uniform(min(_CHUNK, count - start))) for start in range(0, count, _CHUNK)]
        return np.concatenate(chunks) if chunks else np.empty(0)

    def uniform(self, count: int) -> Floats:
        """Return independent numbers, uniform in (0, 1), in float64, of shape (count,)."""
        bits = np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8") >> np.uint64(11)
        return np.asarray((bits + 0.5) / 2.0**53)

    def added(self, tensors: Mapping[str, torch.Tensor], deviation: float) -> Weights:
        """Return tensors plus independent noise of a standard deviation on every entry, in float64.

        Tensors are visited by name, so that seeded noise does not depend on their order.
        """
        found = {}
        for name in sorted(tensors):
            tensor = tensors[name].double()
            found[name] = tensor + deviation * torch.from_numpy(self.normal(tensor.numel())).reshape(tensor.shape).to(tensor.device)
        return {name: found[name] for name in tensors}
