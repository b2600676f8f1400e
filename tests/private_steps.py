"""Sources of noise and draws for tests of private steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmllm.training.private import PrivateSteps, SecretNoise
from fedmllm.types import Weights


class Scripted:
    """Draws the given samples of each step, adds no noise, and records the sums that should get noise.

    Args:
        draws: the positions of the samples that each step draws, in the order of clients and steps.
        after: the source of uniform numbers after these draws; None if they are all 1/2.
    """

    def __init__(self, draws: Sequence[Sequence[int]] = (), after: SecretNoise | None = None) -> None:
        self._draws, self._after = iter(draws), after
        self.sums: list[Weights] = []
        self.deviations: list[float] = []

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return 0 for samples that are drawn and 1 for others."""
        drawn = next(self._draws, None)
        if drawn is None:
            return np.full(count, 0.5) if self._after is None else self._after.uniform(count)
        found = np.ones(count)
        found[list(drawn)] = 0
        return found

    def added(self, tensors: Mapping[str, Tensor], deviation: float) -> Weights:
        """Record a sum and return it."""
        self.deviations.append(deviation)
        self.sums.append({name: tensor.clone() for name, tensor in tensors.items()})
        return {name: tensor.double().clone() for name, tensor in tensors.items()}


def steps_with(
    noise: SecretNoise, clip_norm: float = 1.0, noise_multiplier: float = 1.0, spend: Callable[[str, int, float], None] = lambda *_: None
) -> PrivateSteps:
    """Return private steps that record no expense."""
    return PrivateSteps(clip_norm, noise_multiplier, noise, spend)
