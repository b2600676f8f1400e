"""Noise that partly cancels over rounds: its distribution, its cost, and when it forgets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import toeplitz

from fedmllm.config import Experiment
from fedmllm.errors import ConfigError
from fedmllm.privacy.accounting import Releases, epsilon
from fedmllm.privacy.bands import BandedNoise, coefficients, prefix_error
from fedmllm.privacy.noise import Noise

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]


def matrix(bands: int, rounds: int) -> Matrix:
    """C, independently: the square root of summation, cut to its bands."""
    column = [math.prod((2 * i - 1) / (2 * i) for i in range(1, j + 1)) if j < bands else 0.0 for j in range(rounds)]
    return np.asarray(toeplitz(column, np.zeros(rounds)))


def test_many_bands_are_the_square_root_of_summation() -> None:
    whole = matrix(20, 20)
    assert whole @ whole == pytest.approx(np.tril(np.ones((20, 20))))
    assert coefficients(4) == [1.0, 0.5, 0.375, 0.3125]


@pytest.mark.parametrize("bands", [2, 3, 5])
def test_the_noise_is_that_of_the_factorization(bands: int) -> None:
    """The covariance over rounds is ||c||^2 C^-1 C^-T."""
    rounds, entries, noise = 8, 40_000, BandedNoise(bands, Noise(bands))
    found = np.stack([noise.added({"w": torch.zeros(entries)}, 2.0)["w"].numpy() for _ in range(rounds)])
    inverse = np.linalg.inv(matrix(bands, rounds))
    size = np.linalg.norm(coefficients(bands))
    assert found @ found.T / entries == pytest.approx(4 * size**2 * inverse @ inverse.T, abs=0.15)


@given(st.integers(1, 12), st.integers(1, 40), st.randoms(use_true_random=False))
def test_a_unit_that_takes_part_every_b_rounds_costs_what_independent_noise_costs(bands: int, rounds: int, random: object) -> None:
    """In the whitened release C x + ||c|| z, its contributions have a squared norm of at most k ||c||^2, whatever their signs."""
    times = list(range(0, rounds, bands))
    signs = np.random.default_rng(rounds).choice([-1.0, 1.0], len(times))
    x = np.zeros(rounds)
    x[times] = signs
    size = np.linalg.norm(coefficients(bands))
    assert np.linalg.norm(matrix(bands, rounds) @ x) <= math.sqrt(len(times)) * size * (1 + 1e-12)


def test_a_near_miss_takes_part_too_soon() -> None:
    """Contributions closer than b rounds overlap and cost more, which is why their number is limited."""
    x = np.zeros(20)
    x[[0, 3]] = 1
    size = np.linalg.norm(coefficients(5))
    assert np.linalg.norm(matrix(5, 20) @ x) > math.sqrt(2) * size * 1.05


def test_the_error_of_sums_has_the_reference_value() -> None:
    """0.47 for 10 bands and 50 rounds. At equal error that is epsilon 4.64 for five participations, below Poisson sampling's 5.15."""
    assert prefix_error(1, 50) == pytest.approx(1.0)
    assert prefix_error(10, 50) == pytest.approx(0.47, abs=2e-3)
    whole = np.tril(np.ones((50, 50))) @ np.linalg.inv(matrix(10, 50)) * np.linalg.norm(coefficients(10))
    assert prefix_error(10, 50) == pytest.approx(np.linalg.norm(whole) / math.sqrt(50 * 51 / 2))
    assert epsilon([Releases(1 / prefix_error(10, 50), 5)], 1e-5) == pytest.approx(4.64, abs=0.01)


def test_a_restart_forgets_earlier_noise() -> None:
    """After it, noise is independent of what came before, and has the larger deviation of a first round."""
    noise, zeros = BandedNoise(3, Noise(0)), {"w": torch.zeros(50_000)}
    before = noise.added(zeros, 1.0)["w"]
    noise.restart()
    after = noise.added(zeros, 1.0)["w"]
    assert float(torch.corrcoef(torch.stack([before, after]))[0, 1]) == pytest.approx(0, abs=0.02)
    assert float(after.std()) == pytest.approx(math.hypot(*coefficients(3)), rel=0.02)
    assert float(torch.corrcoef(torch.stack([after, noise.added(zeros, 1.0)["w"]]))[0, 1]) < -0.3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy": {"bands": 6}}, "a client takes part every 5 rounds .* set at most 5"),
        ({"federation": {"sampling": "uniform"}}, "needs unit: client, noise: server, a fixed clip_norm and federation.sampling: cyclic"),
        ({"privacy": {"clip_quantile": 0.5}}, "a fixed clip_norm"),
        ({"algorithm": {"name": "rolora"}}, "rolora uploads other tensors in every round"),
    ],
)
def test_settings_that_break_the_bound_are_refused(changes: dict[str, dict[str, object]], message: str) -> None:
    values: dict[str, dict[str, object]] = {
        "federation": {"num_clients": 10, "clients_per_round": 2, "sampling": "cyclic"},
        "algorithm": {"name": "ffa_lora"},
        "privacy": {"unit": "client", "target_epsilon": 8.0, "bands": 5},
    }
    Experiment.parse(values)
    with pytest.raises(ConfigError, match=message):
        Experiment.parse({section: {**given, **changes.get(section, {})} for section, given in values.items()})
