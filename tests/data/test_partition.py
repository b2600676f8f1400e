from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.data.partition import Indices, dirichlet, iid
from fedmllm.errors import DataError
from fedmllm.randomness import generator


def covers_once(parts: Indices, count: int) -> bool:
    return sorted(np.concatenate(parts).tolist()) == list(range(count))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    num_clients=st.integers(1, 12),
    alpha=st.sampled_from([0.01, 0.5, 5.0, 1000.0]),
    min_size=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_every_sample_goes_to_one_client_and_no_client_starves(
    sizes: list[int], num_clients: int, alpha: float, min_size: int, seed: int
) -> None:
    categories = [f"c{i}" for i, size in enumerate(sizes) for _ in range(size)]
    if len(categories) < num_clients * min_size:
        with pytest.raises(DataError, match="use fewer clients"):
            dirichlet(categories, num_clients, alpha, min_size, generator(seed, "t"))
        return
    parts = dirichlet(categories, num_clients, alpha, min_size, generator(seed, "t"))
    assert len(parts) == num_clients
    assert covers_once(parts, len(categories))
    assert min(map(len, parts)) >= min_size


def label_spread(alpha: float) -> float:
    """Mean over clients of the largest share of one label."""
    categories = ["a", "b", "c", "d"] * 500
    parts = dirichlet(categories, 10, alpha, 1, generator(0, "t"))
    labels = np.array(categories)
    return float(np.mean([max(np.unique(labels[part], return_counts=True)[1]) / len(part) for part in parts]))


def test_small_alpha_skews_more() -> None:
    assert label_spread(0.05) > label_spread(0.5) > label_spread(5.0) > label_spread(500.0)
    assert label_spread(1e6) == pytest.approx(0.25, abs=0.01)


def test_proportions_follow_the_dirichlet() -> None:
    """The share of a category at a client has variance (K - 1) / (K^2 (K alpha + 1)) for K clients."""
    shares = [len(dirichlet(["x"] * 2000, 4, 0.5, 1, generator(seed, "t"))[0]) / 2000 for seed in range(300)]
    assert np.mean(shares) == pytest.approx(0.25, abs=0.05)
    assert np.var(shares) == pytest.approx(3 / (16 * 3), rel=0.2)


@given(st.integers(1, 50), st.integers(1, 10))
def test_iid_sizes_differ_by_one_at_most(count: int, num_clients: int) -> None:
    if count < num_clients:
        with pytest.raises(DataError, match="use fewer clients"):
            iid(count, num_clients, 1, generator(0, "t"))
        return
    parts = iid(count, num_clients, 1, generator(0, "t"))
    assert covers_once(parts, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
