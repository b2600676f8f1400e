"""What a few seeds can say about a difference: Student's t, with the noise of the test samples in it, and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import mean, variance
from typing import NamedTuple

from scipy.special import stdtr, stdtrit

SHARE = 0.95
"""Of intervals that hold the true difference; one less it is the chance that a table names any difference that is none."""


class Interval(NamedTuple):
    """Where a mean difference lies.

    Attributes:
        low, high: the ends, in the differences' own unit.
        p: the two-sided chance of a mean as far from zero, were the true one zero.
    """

    low: float
    high: float
    p: float


def paired(differences: Sequence[float], noise: float, same_samples: bool) -> Interval | None:
    """The t interval of a mean over n seeds (Student, 1908), ``mean +- t(n - 1) se``.

    A seed's difference holds what training and the seed's test samples add by chance. Where every seed draws test samples of its own,
    their variance s^2 over seeds measures both; the noise of the test samples alone is the least that it can be, and few seeds agree by
    chance to less. Where all seeds are tested on the same samples, these shift all differences alike, and s^2 cannot tell:

        se^2 = max(s^2 / n, noise)   or   s^2 / n + noise.

    Either holds the true difference in ``SHARE`` of all cases or more: more where the noise, which is known, makes most of it. (Fewer degrees
    of freedom lost for a noise that is known, after Welch and Satterthwaite, came to 92 % over three seeds.)

    Args:
        differences: one a seed, each the mean over what both methods were tried on.
        noise: variance of their mean over resamples of the test samples, the same for both methods.
        same_samples: whether all seeds are tested on the same samples.

    Returns:
        None for a single seed, which has no variance.
    """
    n = len(differences)
    if n < 2:
        return None
    center, own = mean(differences), variance(differences) / n
    error = own + noise if same_samples else max(own, noise)
    reach = float(stdtrit(n - 1, (1 + SHARE) / 2)) * sqrt(error)
    p = 2 * float(stdtr(n - 1, -abs(center) / sqrt(error))) if error > 0 else float(center == 0)
    return Interval(center - reach, center + reach, p)


def holm(chances: Sequence[float | None]) -> list[bool]:
    """Which differences survive when all of a table are looked at (Holm, 1979): the k-th smallest of m chances must not exceed
    ``(1 - SHARE) / (m - k + 1)``, and all smaller ones must have passed. Any that is none is named with chance ``1 - SHARE`` at most.

    Args:
        chances: of each row; None for a row without one, which counts for nothing.
    """
    survives = [False] * len(chances)
    ranked = sorted((p, i) for i, p in enumerate(chances) if p is not None)
    for place, (p, i) in enumerate(ranked):
        if p > (1 - SHARE) / (len(ranked) - place):
            break
        survives[i] = True
    return survives
