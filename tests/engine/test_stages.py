"""The stages of a run: their cohorts, and what the server knows of their clients."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from fedmllm.engine.stages import Stage, drawn
from fedmllm.types import Holding, Sample


def test_cohorts_are_fair_distinct_and_derived_from_seed_and_round() -> None:
    s = Stage("federated", {f"c{i}": () for i in range(10)}, 1, 3)
    cohorts = [s.cohort(0, r) for r in range(1000)]
    assert all(len(set(cohort)) == 3 and cohort == sorted(cohort) for cohort in cohorts)
    counts = Counter(name for cohort in cohorts for name in cohort)
    assert min(counts.values()) > 250
    assert max(counts.values()) < 350
    assert s.cohort(0, 5) == cohorts[5] != s.cohort(1, 5)


def test_cyclic_groups_take_turns_in_a_fixed_order() -> None:
    """Every client takes part in exactly ceil(T m / N) or floor(T m / N) of T rounds, which no other order of fixed cohorts can lower."""
    s = Stage("federated", {f"c{i}": () for i in range(12)}, 1, 4, sampling="cyclic")
    groups = [s.cohort(0, r) for r in range(3)]
    assert sorted(name for group in groups for name in group) == sorted(s.clients)
    assert [s.cohort(0, r) for r in range(3, 9)] == groups * 2
    assert groups != [Stage("federated", s.clients, 1, 4, sampling="cyclic").cohort(1, r) for r in range(3)]
    counts = Counter(name for r in range(10) for name in s.cohort(0, r))
    assert set(counts.values()) == {3, 4}


SAMPLES = tuple(Sample(str(i), "?", answer, {"text": "t"}, ("a", "b")) for i, answer in enumerate("abb"))
MIXED = Stage(
    "federated",
    {"here": SAMPLES, "there": (), "quiet": ()},
    num_rounds=4,
    clients_per_round=2,
    validate_every=3,
    reported={"there": Holding(5, {"image": 3, "text": 2}), "quiet": Holding(None, {})},
)
"""A client in this process, a site, and a site that withholds its sample counts."""


def test_the_server_knows_the_clients_modalities_and_the_labels_of_simulated_clients_only() -> None:
    """Three samples with text here, and two more at the site that reports them."""
    population = MIXED.population
    assert population.num_clients == 3
    assert population.profile == {"text": 5, "image": 3}
    assert population.labels == {'["a", "b"]': {"a": 1, "b": 2}}


def test_samples_that_sites_withhold_are_not_counted() -> None:
    assert MIXED.num_samples == 3 + 5


def test_a_client_claims_at_most_the_samples_that_it_holds_or_reported() -> None:
    """A site that withheld its number may claim none. For a site that has not reported there is no limit."""
    assert [MIXED.claim(name) for name in ("here", "there", "quiet")] == [3, 5, 0]
    assert replace(MIXED, reported={}).claim("there") is None


def test_the_test_split_is_scored_after_the_last_round_and_the_validation_split_then_and_at_intervals() -> None:
    assert [n for n in range(1, 5) if MIXED.ends(n)] == [4]
    assert [n for n in range(1, 5) if MIXED.validates(n)] == [3, 4]
    assert not any(replace(MIXED, validate_every=0).validates(n) for n in range(1, 5))


def test_additional_draws_of_a_round_differ_and_keep_the_order_of_the_names() -> None:
    names = [f"c{i}" for i in (3, 1, 2, 5, 4, 0)]
    first, second = drawn(names, 3, 0, 7), drawn(names, 3, 0, 7, 1)
    assert first != second
    for chosen in (first, second, drawn(names, 6, 0, 7)):
        assert chosen == [name for name in names if name in chosen]
    assert drawn(names, 3, 0, 7, 1) == second
