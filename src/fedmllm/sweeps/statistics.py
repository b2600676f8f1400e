"""Statistics of differences over a few seeds: Student's t with the noise of the test samples, and Holm's correction."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import mean, variance
from typing import NamedTuple

from scipy.special import stdtr, stdtrit

SHARE = 0.95
"""Confidence level of intervals. One minus it bounds the probability that a table marks any difference that does not exist."""


class Interval(NamedTuple):
    """Confidence interval of a mean difference.

    Attributes:
        low, high: the ends, in the unit of the differences.
        p: two-sided p-value: the probability of a mean at least as far from zero if the true difference is zero.
    """

    low: float
    high: float
    p: float


def paired(differences: Sequence[float], noise: float, same_samples: bool) -> Interval | None:
    """Return the t interval of a mean over n seeds (Student, 1908), ``mean +- t(n - 1) se``.

    A seed's difference contains noise from training and from the seed's test samples. If every seed draws its own test samples, the variance s^2 over
    seeds measures both. It cannot truly be smaller than the noise of the test samples alone, although a few seeds may agree by chance. If all seeds use
    the same test samples, the samples shift all differences equally, and s^2 does not include their noise. The squared standard error is therefore

        se^2 = max(s^2 / n, noise)   or   s^2 / n + noise.

    Both intervals contain the true difference in at least ``SHARE`` of all cases, and in more if the known noise dominates. (Using more degrees of
    freedom because that noise is known, after Welch and Satterthwaite, covered only 92% with three seeds.)

    Args:
        differences: one per seed, each the mean over the columns that both methods have.
        noise: variance of the mean difference over resamples of the test samples, which are the same for both methods.
        same_samples: whether all seeds are tested on the same samples.

    Returns:
        The interval, or None for a single seed, which has no variance.
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
    """Return which differences of a table are significant after Holm's correction (Holm, 1979).

    The k-th smallest of m p-values must not exceed ``(1 - SHARE) / (m - k + 1)``, and all smaller ones must have passed. The probability that any
    difference that does not exist is marked is at most ``1 - SHARE``.

    Args:
        chances: the p-value of each row; None for a row without one, which does not count.
    """
    survives = [False] * len(chances)
    ranked = sorted((p, i) for i, p in enumerate(chances) if p is not None)
    for place, (p, i) in enumerate(ranked):
        if p > (1 - SHARE) / (len(ranked) - place):
            break
        survives[i] = True
    return survives
