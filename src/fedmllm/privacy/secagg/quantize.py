"""Real vectors as integers modulo 2^32, whose sum does not wrap around.

An entry x becomes the nearest integer to ``scale x``, halves to the even one. A sum is read as signed: from -2^31 to 2^31 - 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmllm.errors import ConfigError, FederationError
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.secagg.messages import Vector

Floats = NDArray[np.float64]

_LARGEST = 2.0**30
"""The largest absolute value of a sum, before rounding. It leaves a factor of 2 for rounding and unlikely noise."""
_MIN_DEVIATION = 16
"""The smallest deviation of one client's noise in integer units, so that rounding it changes next to nothing."""
_DEVIATIONS = 12
"""Deviations of the sum's noise that the scale leaves room for."""
_ROUNDING = 1 - 1e-12
"""Keeps rounding in float64 from lifting a clipped norm above its bound."""
_CHUNK = 1 << 20
"""Entries converted at a time, to bound memory."""


@dataclass(frozen=True)
class Weighted:
    """Weighted vectors: ``q_k = round(p_k x_k scale)`` with ``scale = 2^30 / range`` and weights p_k that sum to at most 1.

    Attributes:
        value_range: the largest absolute value of an entry of x_k.

    Raises:
        ConfigError: if it is out of range.
    """

    value_range: float

    def __post_init__(self) -> None:
        if not 0 < self.value_range < math.inf:
            raise ConfigError(f"the range of values must be greater than 0 and finite, got {self.value_range:g}")

    @property
    def scale(self) -> float:
        """Integer units per unit of an entry. One unit is the resolution."""
        return _LARGEST / self.value_range

    def integers(self, vector: Floats, weight: float) -> Vector:
        """Return a client's vector as integers.

        Args:
            vector: x_k.
            weight: p_k, in [0, 1].

        Raises:
            FederationError: if an entry is out of range or not a number, or the weight is.
        """
        if not 0 <= weight <= 1:
            raise FederationError(
                f"a client's weight in a sum must be in [0, 1], got {weight:g}; the server must divide weights by their sum"
            )
        greatest = _greatest(vector)
        if not greatest <= self.value_range:
            raise FederationError(
                f"entries of an update must be numbers of at most {self.value_range:g}, got {greatest:g}; lower the learning rate, or raise the range"
            )
        return _rounded(vector, weight * self.scale)

    def floats(self, total: Vector) -> Floats:
        """Return the sum of ``p_k x_k``. Its error is at most half a unit for each client."""
        return total.view(np.int32) / self.scale


@dataclass(frozen=True)
class Private:
    """Clipped vectors and noise of each client, for differential privacy of their sum without trust in the server.

    With n clients, of which at least m send a vector and at most h collude with the server, each adds noise of variance
    ``(z C)^2 / (m - h)``, so that the noise of the honest clients in the sum has at least the variance (z C)^2. The deviation of all noise
    is at most ``sigma = z C sqrt(n / (m - h))``, and ``scale = 2^30 / (n C + 12 sigma)``. Rounding moves a vector of length d by at most
    sqrt(d)/2 units. Vectors are therefore clipped to ``C - sqrt(d) / (2 scale)``, and the norm of the integers is at most ``C scale``.

    Attributes:
        clip_norm: C.
        noise_multiplier: z.
        num_clients: n, the largest number of clients in the sum.
        min_clients: m, the smallest number; a session with fewer must not be unmasked.
        assumed_colluders: h, how many of them may tell the server their noise.

    Raises:
        ConfigError: if a value is out of range, or the noise is too small for integers.
    """

    clip_norm: float
    noise_multiplier: float
    num_clients: int
    min_clients: int
    assumed_colluders: int = 0

    def __post_init__(self) -> None:
        for name in ("clip_norm", "noise_multiplier"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be greater than 0 and finite, got {getattr(self, name):g}")
        if not 0 <= self.assumed_colluders < self.min_clients <= self.num_clients:
            raise ConfigError(
                f"assumed_colluders must be less than min_clients, and min_clients at most num_clients, got {self.assumed_colluders}, "
                f"{self.min_clients} and {self.num_clients}"
            )
        if self.deviation < _MIN_DEVIATION:
            raise ConfigError(
                f"the noise of a client must have a deviation of at least {_MIN_DEVIATION} integer units, got {self.deviation:.3g}; raise "
                "noise_multiplier or invite fewer clients"
            )

    @property
    def scale(self) -> float:
        """Integer units per unit of an entry."""
        sigma = self.noise_multiplier * self.clip_norm * math.sqrt(self.num_clients / self._honest)
        return _LARGEST / (self.num_clients * self.clip_norm + _DEVIATIONS * sigma)

    @property
    def deviation(self) -> float:
        """The standard deviation of one client's noise in integer units."""
        return self.noise_multiplier * self.clip_norm * self.scale / math.sqrt(self._honest)

    def integers(self, vector: Floats) -> Vector:
        """Return a client's vector, clipped, as integers whose norm is at most ``C scale``. It needs noise before it may be sent.

        Raises:
            ConfigError: if the vector is so long that clipping would leave nothing.
            FederationError: if an entry is not a finite number.
        """
        bound = (self.clip_norm - math.sqrt(len(vector)) / (2 * self.scale)) * _ROUNDING
        if bound <= 0:
            raise ConfigError(f"rounding {len(vector):,} entries takes the whole clip_norm {self.clip_norm:g}; train fewer parameters")
        norm = float(np.linalg.norm(vector))
        if not norm < math.inf:
            raise FederationError(f"entries of an update must be finite, got a norm of {norm:g}; lower the learning rate")
        return _rounded(vector, self.scale * (1.0 if norm <= bound else bound / norm))

    def noise(self, length: int, source: Noise) -> Vector:
        """Return one client's noise in integer units, rounded, of shape (length,).

        Args:
            length: number of entries.
            source: normal numbers; without a seed, nobody can predict them.
        """
        found = np.empty(length, np.uint32)
        for start in range(0, length, _CHUNK):
            part = found[start : start + _CHUNK]
            part[:] = _rounded(source.normal(len(part)), self.deviation)
        return found

    def noisy(self, vector: Floats, source: Noise) -> Vector:
        """Return a client's vector as it is masked: ``integers`` plus ``noise``."""
        found = self.integers(vector)
        found += self.noise(len(vector), source)
        return found

    def floats(self, total: Vector) -> Floats:
        """Return the sum of the clipped vectors and of their noise."""
        return total.view(np.int32) / self.scale

    @property
    def _honest(self) -> int:
        return self.min_clients - self.assumed_colluders


def _greatest(vector: Floats) -> float:
    """Return the greatest absolute value; NaN if an entry is NaN."""
    return max(abs(float(vector.max())), abs(float(vector.min()))) if len(vector) else 0.0


def _rounded(vector: Floats, factor: float) -> Vector:
    """Return the nearest integers to ``factor * vector``, which must be less than 2^31 in absolute value, modulo 2^32."""
    found = np.empty(len(vector), np.int32)
    for start in range(0, len(vector), _CHUNK):
        found[start : start + _CHUNK] = np.rint(vector[start : start + _CHUNK] * factor)
    return found.view(np.uint32)
