"""Samples are divided among the clients that can hold them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedmllm.config import Experiment
from fedmllm.data.datasets import Dataset
from fedmllm.data.federated import spread
from fedmllm.data.holders import Holders
from fedmllm.data.partition import Indices, iid
from fedmllm.errors import DataError
from fedmllm.randomness import generator
from fedmllm.types import Sample

CONTENT = {"image": "x.png", "text": "t"}
KINDS = (("image",), ("text",), ("image", "text"))


def rows(counts: tuple[int, ...], domain: str = "") -> list[Sample]:
    """The given numbers of samples with a picture, with a text, and with both."""
    return [
        Sample(
            f"{domain}{'+'.join(kind)}{i}", "q", "ab"[i % 2], {name: CONTENT[name] for name in kind}, ("a", "b"), "ab"[i % 2], domain=domain
        )
        for kind, count in zip(KINDS, counts, strict=True)
        for i in range(count)
    ]


def all_to_the_first(members: NDArray[np.int64], count: int) -> Indices:
    """The most skewed partition."""
    return [np.arange(len(members)) if i == 0 else np.array([], dtype=np.int64) for i in range(count)]


def is_possible(samples: list[Sample], held: list[tuple[str, ...]], least: int) -> bool:
    """Hall's condition: any group of clients can hold enough samples."""
    groups = (group for size in range(1, len(held) + 1) for group in combinations(held, size))
    return all(sum(any(set(s.modalities) & set(kept) for kept in group) for s in samples) >= least * len(group) for group in groups)


@given(
    counts=st.tuples(*[st.integers(0, 12)] * 3),
    held=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6),
    least=st.integers(1, 6),
    skewed=st.booleans(),
    seed=st.integers(0, 3),
)
def test_every_sample_goes_to_a_holder_and_clients_get_their_minimum_if_possible(
    counts: tuple[int, int, int], held: list[tuple[str, ...]], least: int, skewed: bool, seed: int
) -> None:
    samples, rng = rows(counts), generator(seed, "t")
    names = [f"c{i}" for i in range(len(held))]
    holders = Holders.of(samples, names, dict(zip(names, held, strict=True)))
    divide = all_to_the_first if skewed else lambda members, count: iid(len(members), count, 0, rng)
    unheld = any(not any(set(s.modalities) & set(kept) for kept in held) for s in samples)
    if not samples or unheld or not is_possible(samples, held, least):
        with pytest.raises(DataError):
            holders.divided(divide, least, rng)
        return
    parts = holders.divided(divide, least, rng)
    assert sorted(i for part in parts for i in part.tolist()) == list(range(len(samples)))
    assert all(set(samples[i].modalities) & set(kept) for kept, part in zip(held, parts, strict=True) for i in part)
    assert min(map(len, parts)) >= least


def test_a_client_gets_its_minimum_through_another() -> None:
    """The text client needs texts, which all start at the client that holds both. The latter gives them up and takes pictures instead."""
    samples = rows((8, 4, 0))
    holders = Holders.of(samples, ["i", "t", "b"], {"i": ("image",), "t": ("text",), "b": ("image", "text")})

    def divide(members: NDArray[np.int64], count: int) -> Indices:
        """Pictures go to the first of their holders, texts to the last."""
        last = samples[members[0]].modalities == ("text",)
        return all_to_the_first(members, count)[:: -1 if last else 1]

    parts = holders.divided(divide, 4, generator(0, "t"))
    assert [sorted({samples[i].modalities[0] for i in part}) for part in parts] == [["image"], ["text"], ["image"]]
    assert [len(part) for part in parts] == [4, 4, 4]


def test_with_one_domain_per_client_each_client_can_hold_its_domain() -> None:
    samples = [*rows((30, 0, 0), "vqa"), *rows((0, 30, 0), "cards"), *rows((0, 0, 30), "claims")]
    names = [f"c{i}" for i in range(9)]
    held = dict(zip(names, [("image",)] * 3 + [("text",)] * 3 + [("image", "text")] * 3, strict=True))
    parts = (
        Holders.of(samples, names, held).at_home().divided(lambda m, count: iid(len(m), count, 0, generator(0, "t")), 1, generator(0, "t"))
    )
    homes = [{samples[i].domain for i in part} for part in parts]
    assert all(len(home) == 1 for home in homes)
    assert {frozenset(home) for home in homes} == {frozenset({name}) for name in ("vqa", "cards", "claims")}
    assert sum(map(len, parts)) == 90


@pytest.mark.parametrize("scenario", ["cross-5:5", "hybrid-0.5", "hybrid-0"])
def test_a_dataset_with_missing_modalities_loses_no_sample_to_a_scenario(scenario: str) -> None:
    """A table in which some rows lack a picture and some lack a text."""
    samples = rows((40, 40, 40))
    dataset = Dataset("own", "accuracy", tuple(samples[:-2]), tuple(samples[-2:]), ("image", "text"))
    federation = Experiment.parse({"federation": {"scenario": scenario, "num_clients": 6}}).federation
    for seed in range(4):
        data = spread(dataset, federation, seed)
        assert data.dropped == 0
        assert sum(map(len, data.clients.values())) == 118
        assert min(map(len, data.clients.values())) >= 8
