from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.errors import ConfigError, FederationError
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.secagg.policy import Policy
from fedmllm.privacy.secagg.quantize import Private, Weighted
from fedmllm.privacy.secagg.simulate import secure_sum
from secure_sessions import plain_sum

ranges = st.floats(1e-6, 1e6)


def nearest(value: float, factor: float) -> int:
    """Return the nearest integer to a rounded product, with halves to the even one, in exact arithmetic."""
    return round(Fraction(value * factor))


@settings(max_examples=40)
@given(st.integers(2, 5), ranges, st.data())
def test_the_secure_sum_is_the_sum_of_the_quantized_vectors(count: int, value_range: float, data: st.DataObject) -> None:
    rule, names = Weighted(value_range), "abcde"[:count]
    length = data.draw(st.integers(1, 5))
    real = {name: value_range * np.array(data.draw(st.lists(st.floats(-1, 1), min_size=length, max_size=length))) for name in names}
    parts = data.draw(st.lists(st.floats(0.2, 1), min_size=count, max_size=count))
    weights = {name: part / sum(parts) for name, part in zip(names, parts, strict=True)}
    quantized = {name: rule.integers(real[name], weights[name]) for name in names}
    found = secure_sum(quantized, length, Policy(2, 0.99), weights)
    assert (found.vector == plain_sum(quantized, names)).all()
    exact = sum(weights[name] * real[name] for name in names)
    assert np.abs(rule.floats(found.vector) - exact).max() <= count * (0.5 / rule.scale + 1e-15 * value_range)
    for name in names:
        assert quantized[name].tolist() == [nearest(x, weights[name] * rule.scale) % 2**32 for x in real[name].tolist()]


def test_sums_at_the_ends_of_the_range_do_not_wrap() -> None:
    rule = Weighted(0.5)
    for value in (0.5, -0.5):
        vectors = [rule.integers(np.full(3, value), 1 / 7) for _ in range(7)]
        total = np.sum(vectors, axis=0, dtype=np.uint32)
        assert rule.floats(total) == pytest.approx(np.full(3, value), abs=7 / rule.scale)
    assert rule.integers(np.array([0.5, -0.5]), 1.0).view(np.int32).tolist() == [2**30, -(2**30)]


def test_halves_go_to_the_even_integer() -> None:
    rule = Weighted(2.0**30)
    assert rule.integers(np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49]), 1.0).view(np.int32).tolist() == [0, 2, 2, 0, -2, 0]


@pytest.mark.parametrize("wrong", [1.0000001, -1.0000001, math.inf, -math.inf, math.nan])
def test_an_entry_out_of_range_is_refused(wrong: float) -> None:
    for vector in ([wrong, 0.0], [0.0, wrong], [wrong]):
        with pytest.raises(FederationError, match=r"must be numbers of at most 1, got .*; lower the learning rate, or raise the range"):
            Weighted(1.0).integers(np.array(vector), 0.5)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_a_weight_out_of_range_is_refused(wrong: float) -> None:
    with pytest.raises(FederationError, match=r"weight in a sum must be in \[0, 1\], got"):
        Weighted(1.0).integers(np.zeros(2), wrong)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_a_range_of_values_must_be_positive(wrong: float) -> None:
    with pytest.raises(ConfigError, match="the range of values must be greater than 0 and finite"):
        Weighted(wrong)


def integer_norm(vector: np.ndarray) -> int:
    """Return the square of the norm, exactly."""
    return sum(value**2 for value in vector.view(np.int32).tolist())


@given(st.integers(0, 2**32), st.integers(1, 3000), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(2, 100), st.floats(0.3, 10))
def test_the_norm_of_the_integers_is_at_most_c_times_the_scale(
    seed: int, length: int, size: float, clip_norm: float, clients: int, multiplier: float
) -> None:
    rule = Private(clip_norm, multiplier, clients, max(clients // 2, 2))
    vector = size * np.random.default_rng(seed).standard_normal(length)
    found = rule.integers(vector)
    assert integer_norm(found) <= Fraction(clip_norm * rule.scale) ** 2
    norm = float(np.linalg.norm(vector))
    assert math.sqrt(integer_norm(found)) / rule.scale == pytest.approx(min(norm, clip_norm), abs=2 * math.sqrt(length) / rule.scale)


def test_clipping_to_the_bound_alone_would_exceed_it_by_rounding() -> None:
    """Equal entries that all round up."""
    rule = Private(1.0, 1.0, 10, 10)
    length = next(d for d in range(10_000, 11_000) if rule.scale / math.sqrt(d) % 1 > 0.51)
    vector = np.full(length, 1 / math.sqrt(length))
    near_miss = np.rint(vector * rule.scale).astype(np.int32)
    assert integer_norm(near_miss) > Fraction(rule.scale) ** 2
    assert integer_norm(rule.integers(vector)) <= Fraction(rule.scale) ** 2


def test_small_vectors_are_not_scaled() -> None:
    rule = Private(1.0, 1.0, 4, 3)
    vector = np.array([0.25, -0.5, 0.125])
    assert rule.integers(vector).view(np.int32).tolist() == [nearest(x, rule.scale) for x in vector.tolist()]


def test_the_scale_and_the_noise_have_their_sizes() -> None:
    """With n = 10, C = 2, z = 1.5, m - h = 6: sigma = 3 sqrt(10 / 6)."""
    rule = Private(2.0, 1.5, 10, 8, 2)
    sigma = 3 * math.sqrt(10 / 6)
    assert rule.scale == pytest.approx(2**30 / (20 + 12 * sigma))
    assert rule.deviation == pytest.approx(3 * rule.scale / math.sqrt(6))
    # all clients at the bound and the noise at 12 deviations
    assert (10 * 2 + 12 * sigma) * rule.scale == pytest.approx(2**30)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_vector_that_is_not_finite_is_refused(wrong: float) -> None:
    with pytest.raises(FederationError, match="entries of an update must be finite, got a norm of"):
        Private(1.0, 1.0, 4, 3).integers(np.array([0.0, wrong]))


def test_private_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="clip_norm must be greater than 0 and finite, got 0"):
        Private(0.0, 1.0, 4, 3)
    with pytest.raises(ConfigError, match="noise_multiplier must be greater than 0 and finite, got inf"):
        Private(1.0, math.inf, 4, 3)
    for clients, least, colluders in ((4, 5, 0), (4, 3, 3), (4, 3, -1)):
        with pytest.raises(ConfigError, match="assumed_colluders must be less than min_clients"):
            Private(1.0, 1.0, clients, least, colluders)


def test_noise_of_less_than_16_units_is_refused() -> None:
    def deviation(multiplier: float) -> float:
        return multiplier * 2**30 / (1000 + 12 * multiplier) / math.sqrt(1000)

    assert deviation(0.000472) > 16 > deviation(0.000471)
    assert Private(1.0, 0.000472, 1000, 1000).deviation == pytest.approx(deviation(0.000472))
    with pytest.raises(ConfigError, match=r"at least 16 integer units, got 16; raise noise_multiplier|got 15\.9"):
        Private(1.0, 0.000471, 1000, 1000)


def test_a_vector_too_long_for_its_clip_norm_is_refused() -> None:
    rule = Private(1e-3, 20.0, 10**6, 10**6)
    length = math.ceil((2 * rule.scale * rule.clip_norm) ** 2) + 1
    assert length < 10**7
    with pytest.raises(ConfigError, match=r"takes the whole clip_norm 0\.001; train fewer parameters"):
        rule.integers(np.zeros(length))


def test_the_summed_noise_of_the_clients_has_the_stated_variance() -> None:
    """With n = 6 and m - h = 4 it is (z C)^2 6 / 4 in the sum of all, and (z C)^2 with four of them."""
    rule, length = Private(0.5, 2.0, 6, 5, 1), 100_000
    zeros = np.zeros(length)
    noisy = {name: rule.noisy(zeros, Noise(number)) for number, name in enumerate("abcdef")}
    for names, variance in (("abcdef", 1.5), ("abcd", 1.0)):
        found = rule.floats(secure_sum({name: noisy[name] for name in names}, length, Policy(4)).vector)
        # The deviation of the variance of 1e5 normal numbers is sqrt(2 / 1e5) = 0.0045; four of them
        assert found.var() == pytest.approx(variance, rel=0.018)
        assert found.mean() == pytest.approx(0, abs=0.015)


def test_noise_is_rounded_and_comes_on_top_of_the_clipped_vector() -> None:
    rule = Private(1.0, 1.0, 4, 3)
    vector = np.linspace(-5, 5, 1001)
    noise = rule.noise(1001, Noise(7))
    assert (rule.noisy(vector, Noise(7)) == rule.integers(vector) + noise).all()
    assert noise.view(np.int32).tolist() == [nearest(x, rule.deviation) for x in Noise(7).normal(1001).tolist()]
    assert not (rule.noise(1001, Noise()) == rule.noise(1001, Noise())).any()
