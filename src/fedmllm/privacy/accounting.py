"""How much privacy Gaussian releases cost, computed by Google's ``dp-accounting``.

A *release* publishes a sum of vectors, one per unit (a client or a sample), each clipped to norm C, plus Gaussian noise of standard
deviation ``z C``; z is the noise multiplier. All guarantees hold under adding or removing one unit.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from fedmllm.errors import ConfigError

FINE = 1e-4
"""Resolution of the privacy loss for an epsilon that is stated."""
COARSE = 1e-3
"""Resolution for comparisons with a budget: a tenth of the time, and an epsilon that is larger by less than 1e-3 for 400 releases, 0.01 for 14,000."""


@dataclass(frozen=True)
class Releases:
    """Equal releases that a unit may take part in.

    Attributes:
        noise_multiplier: z, the noise's standard deviation divided by the clip norm.
        count: the number of releases.
        rate: the probability with which the unit takes part in each, independently (Poisson sampling). A rate below 1 amplifies privacy only
            if nobody learns who took part. With 1 the unit takes part in every release.

    Raises:
        ConfigError: if a value is out of range.
    """

    noise_multiplier: float
    count: int = 1
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not self.noise_multiplier > 0:
            raise ConfigError(f"noise_multiplier must be greater than 0, got {self.noise_multiplier:g}")
        if self.count < 0:
            raise ConfigError(f"a number of releases must not be negative, got {self.count}")
        if not 0 < self.rate <= 1:
            raise ConfigError(f"a sampling rate must be in (0, 1], got {self.rate:g}")


def epsilon(releases: Iterable[Releases], delta: float, resolution: float = FINE) -> float:
    """Return the epsilon of releases, one after another, at a delta.

    Without sampling, k releases with multipliers z_i are one Gaussian mechanism with ``1 / sigma^2 = sum_i 1 / z_i^2`` (Dong et al., JRSS B
    2022), whose epsilon is exact (Balle and Wang, ICML 2018). With sampling it is computed from the distribution of the privacy loss
    (Koskela et al., AISTATS 2020), which is an upper bound at any resolution.

    Raises:
        ConfigError: if delta is not in (0, 1), or ``dp-accounting`` is not installed.
    """
    _require_delta(delta)
    return _epsilon(tuple(_merged(releases)), delta, resolution)


@cache
def _epsilon(rows: tuple[Releases, ...], delta: float, resolution: float) -> float:
    """Return the epsilon of merged releases. Many clients take the same number of equal steps."""
    if not rows:
        return 0.0
    library = _library()
    if all(row.rate == 1 for row in rows):
        sigma = sum(row.count / row.noise_multiplier**2 for row in rows) ** -0.5
        return float(library.get_epsilon_gaussian(sigma, delta))
    accountant = library.pld.PLDAccountant(library.NeighboringRelation.ADD_OR_REMOVE_ONE, resolution)
    for row in rows:
        accountant.compose(_event(library, row))
    return float(accountant.get_epsilon(delta))


def noise_multiplier(target_epsilon: float, delta: float, count: int, rate: float = 1.0) -> float:
    """Return the smallest noise multiplier for which ``count`` releases cost at most ``target_epsilon``.

    Args:
        target_epsilon: the epsilon to reach.
        delta: the delta at which it must hold.
        count: the number of releases that a unit may take part in, at least 1.
        rate: see ``Releases``.

    Raises:
        ConfigError: if a value is out of range, or ``dp-accounting`` is not installed.
    """
    _require_delta(delta)
    if not 0 < target_epsilon < math.inf:
        raise ConfigError(f"target_epsilon must be greater than 0 and finite, got {target_epsilon:g}")
    if count < 1:
        raise ConfigError(f"there is no noise for {count} releases; a unit must take part in at least one")
    library = _library()
    # The margin keeps rounding from making the last release too expensive.
    upper = float(math.sqrt(count) * library.get_sigma_gaussian(target_epsilon, delta)) * (1 + 1e-12)
    if rate == 1:
        return upper
    lower = upper
    while epsilon([Releases(lower, count, rate)], delta, COARSE) <= target_epsilon:
        upper, lower = lower, lower / 2
    return float(
        library.calibrate_dp_mechanism(
            lambda: library.pld.PLDAccountant(library.NeighboringRelation.ADD_OR_REMOVE_ONE, COARSE),
            lambda z: _event(library, Releases(z, count, rate)),
            target_epsilon,
            delta,
            library.ExplicitBracketInterval(lower, upper),
            tol=1e-4,
        )
    )


def affordable(budget: float, delta: float, spent: Iterable[Releases], each: Releases) -> int:
    """Return how many more releases of one kind fit into a budget, after those that were spent.

    Args:
        budget: the largest epsilon allowed.
        delta: the delta at which it must hold.
        spent: releases so far.
        each: one further release; its ``count`` is the largest number that is looked for.

    Returns:
        The largest number up to ``each.count`` with an epsilon of at most ``budget``; 0 if not even one more fits.
    """
    before, low, high = list(spent), 0, each.count
    while low < high:
        middle = (low + high + 1) // 2
        more = Releases(each.noise_multiplier, middle, each.rate)
        if epsilon([*before, more], delta, COARSE) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _merged(releases: Iterable[Releases]) -> list[Releases]:
    """Return the releases with equal ones counted together, without empty ones. A ledger holds one line for each release."""
    counts: Counter[tuple[float, float]] = Counter()
    for row in releases:
        counts[row.noise_multiplier, row.rate] += row.count
    return [Releases(z, count, rate) for (z, rate), count in sorted(counts.items()) if count]


def _event(library: Any, row: Releases) -> Any:
    gaussian = library.GaussianDpEvent(row.noise_multiplier)
    sampled = gaussian if row.rate == 1 else library.PoissonSampledDpEvent(row.rate, gaussian)
    return library.SelfComposedDpEvent(sampled, row.count)


def _require_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be in (0, 1), got {delta:g}; use less than one divided by the number of units, e.g. 1e-5")


def require_library() -> None:
    """Check that ``dp-accounting`` is installed, without importing it.

    Raises:
        ConfigError: if it is not.
    """
    if importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError("privacy needs dp-accounting; run pip install 'fedmllm[privacy]'")


def _library() -> Any:
    """Import ``dp-accounting``, which takes seconds."""
    require_library()
    import dp_accounting

    return dp_accounting
