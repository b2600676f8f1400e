from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.special import ndtr, ndtri
from scipy.stats import kstest

from fedmllm.privacy.noise import Noise


def test_noise_is_standard_normal() -> None:
    drawn = Noise(1).normal(100_000)
    assert drawn.var() == pytest.approx(1, abs=0.018)
    assert kstest(drawn, "norm").pvalue > 0.01
    assert np.corrcoef(drawn[:-1], drawn[1:])[0, 1] == pytest.approx(0, abs=0.01)


def test_noise_without_a_seed_never_repeats() -> None:
    first, second = Noise(), Noise()
    assert not first.seeded
    assert not (first.normal(100) == second.normal(100)).any()
    assert not (first.normal(100) == first.normal(100)).any()


def test_seeded_noise_repeats_whatever_the_chunks() -> None:
    whole, source = Noise(3).normal((1 << 20) + 7), Noise(3)
    assert source.seeded
    parts = np.concatenate([source.normal(5), source.normal(0), source.normal((1 << 20) + 2)])
    assert (whole == parts).all()
    assert not (whole == Noise(4).normal(len(whole))).any()


def test_every_entry_gets_noise_of_the_given_deviation() -> None:
    tensors = {"b": torch.zeros(300, 200), "a": torch.full((50_000,), 2.0)}
    noisy = Noise(5).added(tensors, 0.5)
    assert list(noisy) == ["b", "a"]
    for name, mean in (("b", 0.0), ("a", 2.0)):
        assert noisy[name].dtype == torch.float64
        assert noisy[name].shape == tensors[name].shape
        assert float(noisy[name].mean()) == pytest.approx(mean, abs=0.01)
        assert float(noisy[name].std()) == pytest.approx(0.5, abs=0.01)
    other = Noise(5).added(dict(reversed(tensors.items())), 0.5)
    assert all(torch.equal(other[name], noisy[name]) for name in tensors)
    assert all(torch.equal(tensor, tensors[name].double()) for name, tensor in Noise(5).added(tensors, 0.0).items())


def test_uniform_numbers_are_uniform_and_from_the_stream_of_the_noise() -> None:
    drawn = Noise(1).uniform(100_000)
    assert kstest(drawn, "uniform").pvalue > 0.01
    assert 0 < drawn.min() < drawn.max() < 1
    whole, source = Noise(3).uniform(30), Noise(3)
    parts = np.concatenate([source.uniform(10), ndtr(source.normal(10)), source.uniform(10)])
    assert parts == pytest.approx(whole)
    assert len(Noise(3).uniform(0)) == 0


def test_the_largest_draw_is_below_one_and_its_normal_number_is_finite() -> None:
    """With 53 bits, b + 1/2 would round to 2^53."""
    largest = (2**52 - 1 + 0.5) / 2.0**52
    assert largest < 1
    assert ndtri(largest) == pytest.approx(8.2, abs=0.1)
    assert (2**53 - 1 + 0.5) / 2.0**53 == 1


def test_threads_share_a_stream_without_reusing_it() -> None:
    source, size = Noise(6), 50_000
    with ThreadPoolExecutor(4) as pool:
        drawn = np.concatenate(list(pool.map(source.uniform, [size] * 8)))
    assert (np.sort(drawn) == np.sort(Noise(6).uniform(8 * size))).all()
