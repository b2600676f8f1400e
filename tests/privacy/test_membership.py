from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.errors import ConfigError
from fedmllm.privacy.membership import attack, lower_bound, p_value


@pytest.mark.parametrize(("guesses", "ceiling"), [(10, 1.05), (20, 1.82), (100, 3.49)])
def test_correct_guesses_only_certify_the_published_ceiling(guesses: int, ceiling: float) -> None:
    """All right at 95%: p^r = 0.05, so epsilon = ln(p / (1 - p))."""
    found = lower_bound(guesses, guesses, guesses)
    p = 0.05 ** (1 / guesses)
    assert found == pytest.approx(math.log(p / (1 - p)), abs=1e-6)
    assert found == pytest.approx(ceiling, abs=5e-3)


def test_chance_certifies_nothing() -> None:
    assert lower_bound(50, 100, 100) == lower_bound(0, 10, 10) == lower_bound(0, 0, 10) == 0
    assert lower_bound(58, 100, 100) == 0  # P[W >= 58] = 0.067 for a fair coin
    assert lower_bound(59, 100, 100) > 0


@given(st.integers(1, 60), st.integers(0, 60), st.floats(0, 5), st.sampled_from([0.0, 1e-6, 1e-3]))
def test_the_bound_on_good_guesses_agrees_with_the_formula(guesses: int, missed: int, epsilon: float, delta: float) -> None:
    correct, samples = max(0, guesses - missed), 100
    p = 1 / (1 + math.exp(-epsilon))
    pmf = [math.comb(guesses, k) * p**k * (1 - p) ** (guesses - k) for k in range(guesses + 1)]
    slack = max((sum(pmf[correct - i : correct]) / i for i in range(1, correct + 1)), default=0.0)
    expected = min(1.0, sum(pmf[correct:]) + 2 * samples * delta * slack)
    assert p_value(correct, guesses, samples, epsilon, delta) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_positive_delta_certifies_less() -> None:
    assert lower_bound(90, 100, 200, 1e-3) < lower_bound(90, 100, 200, 1e-5) < lower_bound(90, 100, 200)


def test_a_private_mechanism_is_not_ruled_out_more_often_than_promised() -> None:
    """Randomized response with epsilon 1 on 200 coins, 400 times: the bound may exceed 1 in about 5% of them."""
    rng, p = np.random.default_rng(0), 1 / (1 + math.exp(-1))
    bounds = [lower_bound(int(correct), 200, 200) for correct in rng.binomial(200, p, 400)]
    assert np.mean(np.array(bounds) > 1) < 0.08
    assert np.median(bounds) > 0.6


def test_an_attack_is_measured_by_ranks() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 3000), rng.normal(0, 1, 3000)
    found = attack(members, others)
    assert found.auc == pytest.approx((members[:, None] > others).mean(), abs=1e-12)
    assert found.auc == pytest.approx(0.760, abs=0.02)
    assert found.tpr == pytest.approx((members > np.quantile(others, 0.99)).mean(), abs=2e-3)


def test_ties_are_chance_and_perfect_scores_find_everybody() -> None:
    assert attack(np.ones(5), np.ones(7)) == (0.5, 0.0)
    assert attack(np.ones(5), np.zeros(7)) == (1.0, 1.0)
    assert attack(np.zeros(5), np.ones(7)) == (0.0, 0.0)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="correct <= guesses <= samples, got 3, 2 and 5"):
        lower_bound(3, 2, 5)
    with pytest.raises(ConfigError, match="members and other samples, got 0 and 3"):
        attack(np.empty(0), np.zeros(3))
