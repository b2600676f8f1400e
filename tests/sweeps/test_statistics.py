"""Intervals of paired differences over few seeds: their coverage where the truth is known, and corrections for many rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from scipy.stats import ttest_1samp

from fedmllm.sweeps.statistics import SHARE, holm, paired

TRIALS = 2000
"""Three standard errors of a share near 0.95 are 0.015."""


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8).filter(lambda row: np.std(row) > 1e-3))
def test_without_noise_it_equals_students_test(differences: list[float]) -> None:
    found, expected = paired(differences, 0.0, False), ttest_1samp(differences, 0.0)
    assert found is not None
    assert found.p == pytest.approx(expected.pvalue, abs=1e-12)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(SHARE)))


def test_the_interval_is_at_least_the_noise_of_the_test_samples() -> None:
    """Student's t with two degrees of freedom is 4.303. Only the noise of shared test samples is added to the seeds' variance."""
    for same in (False, True):
        found = paired([0.1, 0.1, 0.1], 0.02**2, same)
        assert found is not None
        assert (found.high - 0.1, found.p) == (pytest.approx(4.302653 * 0.02), pytest.approx(2 * student.sf(5, 2)))
    one = np.std([0.0, 0.1, 0.2], ddof=1) / np.sqrt(3)
    for same, error in ((False, one), (True, np.hypot(one, 0.02))):
        found = paired([0.0, 0.1, 0.2], 0.02**2, same)
        assert found is not None
        assert found.high - 0.1 == pytest.approx(4.302653 * error)
    assert paired([0.0, 0.0, 0.0], 0.0, False) == (0.0, 0.0, 1.0)
    assert paired([0.1, 0.1], 0.0, False) == (0.1, 0.1, 0.0)
    assert paired([0.1], 0.02, False) is None


def differences(rng: np.random.Generator, seeds: int, spread: float, noise: float, same: bool) -> np.ndarray:
    """Measured differences whose truth is 0.3: training adds ``spread``, the mean over the test samples ``noise``."""
    tested = noise * rng.standard_normal((TRIALS, 1 if same else seeds))
    return 0.3 + spread * rng.standard_normal((TRIALS, seeds)) + tested


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize(("spread", "noise"), [(1.0, 0.0), (1.0, 0.3), (0.5, 0.5), (0.1, 1.0), (0.0, 1.0)])
def test_an_interval_covers_the_truth_as_often_as_stated(seeds: int, same: bool, spread: float, noise: float) -> None:
    """The interval covers the truth in at least 95 of 100 trials, and in exactly that share if seeds differ by training alone."""
    rng = np.random.default_rng(0)
    measured = differences(rng, seeds, spread, noise, same)
    of_mean = noise**2 if same else noise**2 / seeds
    found = [paired(row, of_mean, same) for row in measured.tolist()]
    covered = np.mean([interval is not None and interval.low <= 0.3 <= interval.high for interval in found])
    assert covered > SHARE - 0.015
    if noise == 0:
        assert covered < SHARE + 0.015


def test_the_percentile_bootstrap_covers_the_truth_too_rarely() -> None:
    """The percentile bootstrap over three seeds draws from ten sets of three, one in nine of which is a single seed."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(3, size=(400, 3))
    ends = [np.quantile(row[drawn].mean(1), [0.025, 0.975]) for row in differences(rng, 3, 1.0, 0.0, False)]
    assert 0.70 < np.mean([low <= 0.3 <= high for low, high in ends]) < 0.80


def test_holm_matches_a_hand_computation() -> None:
    """The thresholds are 0.05 / 4, / 3, / 2, / 1. The third fails, and so does the fourth, although it is below its own."""
    assert holm([0.04, 0.01, None, 0.016, 0.03]) == [False, True, False, True, False]
    assert holm([0.0125, 0.0166, 0.025, 0.05]) == [True] * 4
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_between_bonferroni_and_no_correction(chances: list[float]) -> None:
    level = 1 - SHARE
    for p, survives in zip(chances, holm(chances), strict=True):
        assert survives or p > level / len(chances)
        assert not survives or p <= level


def test_a_table_of_equal_methods_marks_none() -> None:
    """Twenty rows over three seeds. Without correction, two tables of three would name one."""
    rng, named, uncorrected = np.random.default_rng(0), 0, 0
    for _ in range(500):
        found = [paired(row, 0.0, False) for row in rng.standard_normal((20, 3)).tolist()]
        chances = [interval.p for interval in found if interval is not None]
        named += any(holm(chances))
        uncorrected += min(chances) <= 1 - SHARE
    assert named / 500 < 1 - SHARE + 0.03
    assert uncorrected / 500 > 0.5
