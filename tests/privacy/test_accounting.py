from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.errors import ConfigError
from fedmllm.privacy.accounting import Releases, affordable, epsilon, noise_multiplier

DELTA = 1e-5


def gaussian_delta(eps: float, mu: float) -> float:
    """Return delta of a Gaussian mechanism with sensitivity mu and unit noise: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu)


@pytest.mark.parametrize(
    ("releases", "delta", "expected"),
    [
        ([Releases(1.0)], DELTA, 4.377178),
        ([Releases(1.0, 5)], DELTA, 11.480023),
        ([Releases(1.0, 10)], DELTA, 17.856587),
        ([Releases(1.0, 11)], DELTA, 19.00),
        ([Releases(2.0, 10)], 1e-6, 8.306225),
        ([Releases(1.0), Releases(2.0)], DELTA, 4.983306),
    ],
)
def test_epsilon_of_gaussian_releases_has_the_published_value(releases: list[Releases], delta: float, expected: float) -> None:
    """Known mistakes give 33.10 (mu = k / z) and 13.2298 (conversion from zCDP) for five releases with z = 1."""
    assert epsilon(releases, delta) == pytest.approx(expected, rel=1e-6 if expected != 19.00 else 1e-3)


@pytest.mark.parametrize(("count", "target", "expected"), [(3, 8, 1.039627), (5, 8, 1.342153), (14, 8, 2.245852), (5, 2, 4.458300)])
def test_noise_is_solved_for_the_target(count: int, target: float, expected: float) -> None:
    assert noise_multiplier(target, DELTA, count) == pytest.approx(expected, abs=1e-6)


@given(st.floats(0.5, 20), st.integers(1, 200), st.sampled_from([1e-4, 1e-6, 1e-9]))
def test_epsilon_without_sampling_agrees_with_the_closed_form(z: float, count: int, delta: float) -> None:
    found = epsilon([Releases(z, count)], delta)
    mu = math.sqrt(count) / z
    if found == 0:
        assert gaussian_delta(0, mu) <= delta
    elif found < 500:  # e^epsilon overflows the closed form above
        assert gaussian_delta(found, mu) == pytest.approx(delta, rel=1e-4)


@given(st.floats(0.6, 5), st.integers(1, 50))
def test_epsilon_is_monotone_and_no_order_of_releases_matters(z: float, count: int) -> None:
    once = epsilon([Releases(z, count)], DELTA)
    assert epsilon([Releases(z, count + 1)], DELTA) > once
    assert epsilon([Releases(z * 1.1, count)], DELTA) < once
    assert epsilon([Releases(z)] * count, DELTA) == once
    mixed = [Releases(z, count), Releases(2.0)]
    assert epsilon(mixed, DELTA) == epsilon(mixed[::-1], DELTA) > once


def test_sampling_amplifies_by_the_published_amount() -> None:
    """N = 100, cohort 10, 50 rounds, z = 1, and the setting of the DP-SGD tutorial with 256 of 60,000 samples."""
    assert epsilon([Releases(1.0, 50, 0.1)], DELTA) == pytest.approx(5.15, abs=5e-3)
    assert epsilon([Releases(1.1, 14062, 256 / 60000)], DELTA) == pytest.approx(2.38169, abs=1e-5)


def test_sampling_costs_no_more_than_the_renyi_bound() -> None:
    """RDP of order 2 of a sampled Gaussian has the closed form ln(1 + q^2 (e^(1/z^2) - 1)); its conversion bounds epsilon from above."""
    q, z, count = 0.1, 1.0, 3
    renyi = count * math.log(1 + q**2 * (math.exp(1 / z**2) - 1))
    bound = renyi + math.log(1 / DELTA)
    assert 0 < epsilon([Releases(z, count, q)], DELTA) < bound


@pytest.mark.slow
def test_the_noise_for_sampled_releases_reaches_the_target_from_below() -> None:
    z = noise_multiplier(2, DELTA, 50, 0.1)
    assert 1.99 < epsilon([Releases(z, 50, 0.1)], DELTA) <= 2
    assert z < 1.890376  # what Renyi accounting needs


def test_a_budget_buys_as_many_releases_as_fit() -> None:
    z = noise_multiplier(8, DELTA, 5) + 1e-9
    assert affordable(8, DELTA, [], Releases(z, 100)) == 5
    assert affordable(8, DELTA, [Releases(z, 2)], Releases(z, 100)) == 3
    assert affordable(8, DELTA, [Releases(z, 5)], Releases(z, 100)) == 0
    assert affordable(8, DELTA, [], Releases(z, 4)) == 4


def test_nothing_released_costs_nothing() -> None:
    assert epsilon([], DELTA) == epsilon([Releases(1.0, 0)], DELTA) == 0


def test_values_out_of_range_are_refused() -> None:
    for z in (0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="noise_multiplier must be greater than 0"):
            Releases(z)
    for rate in (0.0, 1.1):
        with pytest.raises(ConfigError, match=r"a sampling rate must be in \(0, 1\]"):
            Releases(1.0, 1, rate)
    with pytest.raises(ConfigError, match="must not be negative"):
        Releases(1.0, -1)
    for delta in (0.0, 1.0):
        with pytest.raises(ConfigError, match=r"delta must be in \(0, 1\)"):
            epsilon([Releases(1.0)], delta)
    with pytest.raises(ConfigError, match="target_epsilon must be greater than 0"):
        noise_multiplier(0, DELTA, 1)
    with pytest.raises(ConfigError, match="must take part in at least one"):
        noise_multiplier(1, DELTA, 0)
