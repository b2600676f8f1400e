"""Noise that partly cancels over rounds, for sums whose total matters more than each of them.

(Amplified) Banded Matrix Factorization: A unified approach to private training. Choquette-Choo et al., NeurIPS 2023.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from fedmllm.privacy.noise import Noise
from fedmllm.types import Weights


def coefficients(bands: int) -> list[float]:
    """Return the first coefficients of ``(1 - x)^(-1/2)``, i.e. ``c_j = (2j choose j) / 4^j``: the square root of summation."""
    return [math.comb(2 * j, j) / 4**j for j in range(bands)]


class BandedNoise:
    """Gaussian noise with b bands: with independent normal tensors z_t,

        w_t = s ||c|| z_t - sum_{j = 1 .. b-1} c_j w_{t-j}

    Publishing ``x_t + w_t`` in every round is as private as publishing ``C x + s ||c|| z``, where C is the lower-triangular Toeplitz matrix with c
    on its b diagonals. A unit that takes part at most every b rounds changes k disjoint stretches of ``C x`` by a norm of at most ``||c||`` times
    its bound each, so that the cost is that of k releases with noise of deviation s, as with independent noise. But the noise of sums over rounds
    is lower: its root mean square over 50 rounds is 0.47 times as large for 10 bands.

    The noise of the last rounds is kept in memory only, because it reveals a part of the next round's noise. A new process starts without it.
    The guarantee is the same: C is then block-diagonal.

    Args:
        bands: b, at least 2.
        noise: the source of independent noise.
    """

    def __init__(self, bands: int, noise: Noise) -> None:
        self._coefficients, self._noise = coefficients(bands), noise
        self._earlier: deque[Weights] = deque(maxlen=bands - 1)

    def restart(self) -> None:
        """Forget the noise of earlier rounds. It must be called if a round releases nothing, after which units may take part sooner."""
        self._earlier.clear()

    def added(self, tensors: Mapping[str, torch.Tensor], deviation: float) -> Weights:
        """Return a round's tensors plus its noise, in float64.

        Args:
            tensors: the tensors, of the same names and shapes in every round.
            deviation: s.
        """
        zeros = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in tensors.items()}
        current = self._noise.added(zeros, deviation * math.hypot(*self._coefficients))
        for factor, earlier in zip(self._coefficients[1:], reversed(self._earlier), strict=False):
            current = {name: tensor - factor * earlier[name] for name, tensor in current.items()}
        self._earlier.append(current)
        return {name: tensor.double() + current[name] for name, tensor in tensors.items()}


def prefix_error(bands: int, rounds: int) -> float:
    """Return the root mean square, over rounds, of the noise in the sums of all rounds so far, relative to independent noise of the same cost.

    Args:
        bands: b.
        rounds: number of rounds.
    """
    own = coefficients(bands)
    inverse = _inverse(own, rounds)
    totals = [sum(inverse[: j + 1]) for j in range(rounds)]
    banded = sum((rounds - j) * total**2 for j, total in enumerate(totals))
    return math.hypot(*own) * math.sqrt(banded / (rounds * (rounds + 1) / 2))


def _inverse(series: Sequence[float], count: int) -> list[float]:
    """Return the first coefficients of one divided by a power series that begins with 1."""
    found = [1.0]
    for t in range(1, count):
        found.append(-sum(series[j] * found[t - j] for j in range(1, min(t, len(series) - 1) + 1)))
    return found
