"""Bounds on what one unit can change: a fixed clip norm, or one that follows a quantile of the norms."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedmllm import weights as W
from fedmllm.errors import ConfigError
from fedmllm.types import Slots

_ROUNDING = 1 - 1e-12
"""Keeps rounding in float64 from lifting a clipped norm above its bound."""


def joint_norm(slots: Slots) -> float:
    """Return the Euclidean norm over all entries of all tensors, in float64."""
    return math.hypot(*(W.norm(dict(tensors)) for tensors in slots.values() if tensors))


def clipped(slots: Slots, clip_norm: float) -> Slots:
    """Return tensors in float64, scaled by ``min(1, C / norm)`` with the norm over all of them together.

    Clipping each tensor to C would allow a norm of ``C sqrt(number of tensors)``, for which the noise would be too small.

    Args:
        slots: finite tensors by kind and name.
        clip_norm: C, greater than 0.

    Returns:
        The tensors, whose joint norm is at most C.
    """
    norm = joint_norm(slots)
    scale = 1.0 if norm <= clip_norm else clip_norm / norm * _ROUNDING
    return {kind: {name: tensor.double() * scale for name, tensor in tensors.items()} for kind, tensors in slots.items()}


@dataclass(frozen=True)
class AdaptiveClip:
    """A clip norm that follows a quantile of the norms privately (Andrew et al., NeurIPS 2021).

    Each unit k also contributes a bit, shifted to ``b_k = 1/2`` if its norm is at most C and ``-1/2`` otherwise, so that it can change the sum
    of the bits by 1/2 only. With noise of deviation sigma_b on that sum, m units and quantile q:

        f = (sum_k b_k + sigma_b N(0, 1)) / m + 1/2,   C <- C exp(-learning_rate (f - q))

    Attributes:
        quantile: q, the share of the norms to be at most C.
        learning_rate: the speed of adaptation.

    Raises:
        ConfigError: if a value is out of range.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ConfigError(f"quantile must be in (0, 1), got {self.quantile:g}")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate must be greater than 0 and finite, got {self.learning_rate:g}")

    def bit(self, norm: float, clip_norm: float) -> float:
        """Return a unit's bit b_k."""
        return 0.5 if norm <= clip_norm else -0.5

    def next(self, clip_norm: float, noisy_sum: float, units: int) -> float:
        """Return the next clip norm.

        Args:
            clip_norm: C.
            noisy_sum: the sum of the bits plus its noise.
            units: m, the fixed number of units.
        """
        share = noisy_sum / units + 0.5
        return clip_norm * math.exp(-self.learning_rate * (share - self.quantile))


def bit_deviation(noise_multiplier: float, units: int) -> float:
    """Return sigma_b, the deviation of the noise on the sum of the bits: ``max(m / 20, z)``, which costs little."""
    return max(units / 20, noise_multiplier)


def update_multiplier(noise_multiplier: float, deviation: float) -> float:
    """Return the noise multiplier of the updates, so that updates and bits together cost what z costs.

    ``z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2)``, which is larger than z.

    Raises:
        ConfigError: if the bits alone cost more than z.
    """
    left = noise_multiplier**-2 - (2 * deviation) ** -2
    if left <= 0:
        raise ConfigError(f"the noise on the bits must be greater than {noise_multiplier / 2:g}, got {deviation:g}")
    return float(left**-0.5)
