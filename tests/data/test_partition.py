from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.data.partition import Indices, by_domain, dirichlet, iid, natural, quantity
from fedmllm.errors import DataError
from fedmllm.randomness import generator


def covers_once(parts: Indices, count: int) -> bool:
    return sorted(np.concatenate(parts).tolist()) == list(range(count))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    num_clients=st.integers(1, 12),
    alpha=st.sampled_from([0.01, 0.5, 5.0, 1000.0]),
    min_size=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_every_sample_goes_to_one_client_and_every_client_gets_its_minimum(
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
    """The mean over clients of the largest share of one label."""
    categories = ["a", "b", "c", "d"] * 500
    parts = dirichlet(categories, 10, alpha, 1, generator(0, "t"))
    labels = np.array(categories)
    return float(np.mean([max(np.unique(labels[part], return_counts=True)[1]) / len(part) for part in parts]))


def test_small_alpha_skews_more() -> None:
    assert label_spread(0.05) > label_spread(0.5) > label_spread(5.0) > label_spread(500.0)
    assert label_spread(1e6) == pytest.approx(0.25, abs=0.01)


def test_proportions_follow_the_dirichlet() -> None:
    """A category's share at a client has variance (K - 1) / (K^2 (K alpha + 1)) for K clients."""
    shares = [len(dirichlet(["x"] * 2000, 4, 0.5, 1, generator(seed, "t"))[0]) / 2000 for seed in range(300)]
    assert np.mean(shares) == pytest.approx(0.25, abs=0.05)
    assert np.var(shares) == pytest.approx(3 / (16 * 3), rel=0.2)


@given(st.integers(1, 50), st.integers(1, 10))
def test_iid_sizes_differ_by_at_most_one(count: int, num_clients: int) -> None:
    if count < num_clients:
        with pytest.raises(DataError, match="use fewer clients"):
            iid(count, num_clients, 1, generator(0, "t"))
        return
    parts = iid(count, num_clients, 1, generator(0, "t"))
    assert covers_once(parts, count)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_small_clients_are_filled_from_the_largest() -> None:
    """With one category and a tiny alpha, one client gets everything. The others are filled from it alone."""
    parts = dirichlet(["x"] * 1000, 10, 1e-3, 8, generator(0, "t"))
    assert sorted(map(len, parts)) == [8] * 9 + [928]
    assert covers_once(parts, 1000)


def test_every_client_of_a_large_federation_gets_its_minimum() -> None:
    """Ten samples per client on average and eight at least: nearly every client gives or takes."""
    parts = dirichlet([f"c{i % 5}" for i in range(20_000)], 2000, 0.5, 8, generator(0, "t"))
    assert covers_once(parts, 20_000)
    assert min(map(len, parts)) == 8


def test_quantity_skews_sizes_but_not_labels() -> None:
    labels = np.array(["a", "b"] * 2000)
    parts = quantity(4000, 8, 0.5, 8, generator(0, "t"))
    assert covers_once(parts, 4000)
    assert max(map(len, parts)) > 3 * min(map(len, parts))
    large = [part for part in parts if len(part) > 300]
    assert all(np.mean(labels[part] == "a") == pytest.approx(0.5, abs=0.1) for part in large)


def test_natural_clients_keep_their_samples() -> None:
    owners = ["b", "a", "c", "a", "b", "a"]
    assert [part.tolist() for part in natural(owners, 3, 1)] == [[1, 3, 5], [0, 4], [2]]


def test_natural_clients_are_grouped_into_fewer_clients() -> None:
    owners = [f"event-{i % 7}" for i in range(700)] + ["large"] * 500
    parts = natural(owners, 3, 1)
    assert covers_once(parts, 1200)
    held = [{owners[i] for i in part} for part in parts]
    assert sum(map(len, held)) == 8
    assert sorted(map(len, parts)) == [300, 400, 500]


@pytest.mark.parametrize(
    ("owners", "num_clients", "min_size", "rule"),
    [
        (["a", "", "b"], 2, 1, "1 of 3 samples have none"),
        (["a", "b"], 3, 1, "3 clients requested, but the samples have only 2 natural clients"),
        (["a", "b", "b"], 2, 2, "a natural client has 1 samples, but the minimum is 2"),
    ],
)
def test_impossible_natural_partitions_are_refused(owners: list[str], num_clients: int, min_size: int, rule: str) -> None:
    with pytest.raises(DataError, match=rule):
        natural(owners, num_clients, min_size)


def test_each_client_holds_one_domain() -> None:
    domains, categories = ["x"] * 60 + ["y"] * 300, [f"c{i % 3}" for i in range(360)]
    parts = by_domain(domains, categories, 5, 0.5, 4, generator(0, "t"))
    assert covers_once(parts, 360)
    assert [{domains[i] for i in part} for part in parts] == [{"x"}, {"y"}, {"x"}, {"y"}, {"x"}]
    with pytest.raises(DataError, match="1 clients cannot hold 2 separate domains"):
        by_domain(domains, categories, 1, 0.5, 4, generator(0, "t"))
