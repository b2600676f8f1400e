from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fedmllm.config import Experiment
from fedmllm.data.datasets import Dataset, DatasetRequest, load_dataset
from fedmllm.data.federated import FederatedData, federate
from fedmllm.errors import ConfigError, DataError
from fedmllm.evaluation.metrics import all_metrics, majority_score, score
from fedmllm.types import Prediction

MEDICAL = [{"dataset": "digits-vqa", "num_train": 60, "num_test": 20}, {"dataset": "digits-cards", "num_train": 40, "num_test": 20}]
TASKS = [{"dataset": "digits-claims", "num_train": 60, "num_test": 30}, {"dataset": "digits-vqa", "num_train": 60, "num_test": 20}]


def mixture(parts: list[dict[str, Any]], **settings: Any) -> Dataset:
    return load_dataset("mixture", DatasetRequest(None, 0, options={"parts": parts}, **settings))


def federated(parts: list[dict[str, Any]], **federation: Any) -> FederatedData:
    seed = federation.pop("seed", 0)
    settings = {"num_clients": 4, "min_partition_size": 4, **federation}
    experiment = Experiment.parse({"data": {"dataset": "mixture", "options": {"parts": parts}}, "federation": settings})
    return federate(experiment.data, experiment.federation, seed)


def test_parts_keep_their_samples_under_their_name() -> None:
    mixed, alone = mixture(MEDICAL), load_dataset("digits-cards", DatasetRequest(None, 0, 40, 20))
    assert (len(mixed.train), len(mixed.test)) == (100, 40)
    cards = [sample for sample in mixed.train if sample.domain == "digits-cards"]
    assert [sample.id for sample in cards] == [f"digits-cards/{sample.id}" for sample in alone.train]
    assert [(sample.question, sample.answer, sample.content) for sample in cards] == [
        (s.question, s.answer, s.content) for s in alone.train
    ]
    assert mixed.modalities == ("image", "text")
    assert mixed.metric == "accuracy"


def test_domain_partition_gives_each_client_one_part() -> None:
    data = federated(MEDICAL, partition="domain")
    held = [{sample.domain for sample in samples} for samples in data.clients.values()]
    assert held == [{"digits-cards"}, {"digits-vqa"}] * 2


def test_under_cross_each_client_holds_one_dataset() -> None:
    data = federated(MEDICAL, scenario="cross-5:5")
    held = Counter(next(iter({sample.domain for sample in samples})) for samples in data.clients.values())
    assert held == {"digits-vqa": 2, "digits-cards": 2}
    assert data.dropped == 0
    assert sum(map(len, data.clients.values())) == 100


SCENARIOS = ["cross-3:7", "cross-5:5", "cross-7:3", "hybrid-0.8", "hybrid-0.7", "hybrid-0.6", "hybrid-0.3"]
PARTITIONS = [
    {"partition": "dirichlet"},
    {"partition": "iid"},
    {"partition": "quantity"},
    {"partition": "domain"},
    {"protocol": "reference"},
]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("division", PARTITIONS, ids=lambda division: next(iter(division.values())))
def test_no_sample_of_a_mixture_is_dropped_and_every_client_gets_its_minimum(scenario: str, division: dict[str, str]) -> None:
    """Ten clients with at least 8 samples each hold every picture and every text unchanged."""
    parts = [{"dataset": "digits-vqa", "num_train": 120, "num_test": 10}, {"dataset": "digits-cards", "num_train": 120, "num_test": 10}]
    for seed in range(4):
        data = federated(parts, scenario=scenario, seed=seed, num_clients=10, min_partition_size=8, **division)
        held = {sample.id: sample for samples in data.clients.values() for sample in samples}
        assert data.dropped == 0
        assert held == {sample.id: sample for sample in data.dataset.train}
        assert sum(map(len, data.clients.values())) == 240
        assert "protocol" in division or min(map(len, data.clients.values())) >= 8


def test_iid_divides_each_domain_evenly_among_its_holders() -> None:
    """As in the published generators: pictures go to clients with pictures, texts to clients with texts, without label skew."""
    for scenario in SCENARIOS[:-1]:
        data = federated(MEDICAL, scenario=scenario, num_clients=5, partition="iid")
        for domain, count in (("digits-vqa", 60), ("digits-cards", 40)):
            sizes = [sum(sample.domain == domain for sample in samples) for samples in data.clients.values()]
            holders = [size for size in sizes if size]
            assert sum(holders) == count
            assert max(holders) - min(holders) <= 1


def test_a_hybrid_client_without_modalities_gets_one_for_all_its_samples() -> None:
    """With a probability of 0 this applies to every client. In a single dataset the choice is per sample."""
    data = federated(MEDICAL, scenario="hybrid-0", num_clients=10)
    kinds = [{sample.modalities for sample in samples} for samples in data.clients.values()]
    assert {len(kind) for kind in kinds} == {1}
    assert set.union(*kinds) == {("image",), ("text",)}
    experiment = Experiment.parse({"data": {"num_train": 200, "num_test": 8}, "federation": {"scenario": "hybrid-0", "num_clients": 4}})
    for samples in federate(experiment.data, experiment.federation, 0).clients.values():
        assert {sample.modalities for sample in samples} == {("image",), ("text",)}


def test_the_reference_protocol_chooses_a_mixture_s_holders() -> None:
    """In the published cross-3:7, clients 0, 1 and 4 hold pictures."""
    data = federated(MEDICAL, scenario="cross-3:7", protocol="reference", num_clients=10)
    domains = [{sample.domain for sample in samples} for samples in data.clients.values()]
    assert [i for i, held in enumerate(domains) if held == {"digits-vqa"}] == [0, 1, 4]
    assert all(held in ({"digits-vqa"}, {"digits-cards"}) for held in domains)


def test_the_reference_protocol_keeps_all_rows_of_a_mixture() -> None:
    """A mixture's categories begin with the dataset's name; its options do not."""
    data = federated(TASKS, scenario="aligned", protocol="reference")
    assert sum(map(len, data.clients.values())) == len(data.dataset.train) == 120


def test_samples_that_no_client_can_hold_are_an_error() -> None:
    with pytest.raises(DataError, match="no client can hold some training samples") as caught:
        federated(MEDICAL, scenario="cross-1:0")
    assert "40 samples with text of digits-cards" in str(caught.value)


def test_impossible_client_sizes_are_an_error_with_the_reason() -> None:
    """Two of four clients hold texts, of which there are 40. There are enough pictures."""
    with pytest.raises(
        DataError, match="2 clients of at least 21 samples need 42, but there are only 40 samples that they can hold"
    ) as caught:
        federated(MEDICAL, scenario="cross-5:5", min_partition_size=21)
    assert r"only 40 samples that they can hold under the scenario (text)" in str(caught.value)
    assert min(map(len, federated(MEDICAL, scenario="cross-5:5", min_partition_size=20).clients.values())) >= 20


def test_a_mixture_of_tasks_is_scored_by_the_mean_of_their_scores() -> None:
    dataset = mixture(TASKS)
    assert dataset.metric == "mixed"
    right = [Prediction(s, s.answer, tuple(float(option == s.answer) for option in s.options)) for s in dataset.test]
    no_vqa = [Prediction(p.sample, None) if p.sample.domain == "digits-vqa" else p for p in right]
    numbers = all_metrics("mixed", no_vqa, 0)
    assert score("mixed", right) == 1.0
    assert (numbers["score"], numbers["score_digits-claims"], numbers["score_digits-vqa"]) == (0.5, 1.0, 0.0)
    assert numbers["failures"] == 20
    vqa = [s for s in dataset.train if s.domain == "digits-vqa"], [s for s in dataset.test if s.domain == "digits-vqa"]
    assert majority_score("mixed", dataset.train, dataset.test) == pytest.approx((0.5 + majority_score("accuracy", *vqa)) / 2)


@pytest.mark.parametrize(
    ("parts", "rule"),
    [
        (MEDICAL[:1], r"data\.options\.parts: must have at least 2 entries"),
        ([MEDICAL[0], {"dataset": "digit-cards"}], "'digit-cards' is not a dataset that can be mixed"),
        ([MEDICAL[0], {"dataset": "mixture"}], "'mixture' is not a dataset that can be mixed"),
        ([MEDICAL[0], MEDICAL[0]], "'digits-vqa' is listed 2 times"),
        ([MEDICAL[0], {"dataset": "digits-cards", "folder": "x"}], r"data\.options\.parts\.1\.folder"),
    ],
)
def test_invalid_mixtures_are_refused(parts: list[dict[str, Any]], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        mixture(parts)


def test_sizes_are_set_for_each_part() -> None:
    with pytest.raises(ConfigError, match="set num_train, num_test and num_validation for each part"):
        mixture(MEDICAL, num_train=10)


def test_a_domain_partition_needs_a_mixture() -> None:
    experiment = Experiment.parse({"data": {"num_train": 40, "num_test": 8}, "federation": {"partition": "domain", "num_clients": 4}})
    with pytest.raises(ConfigError, match="divides the datasets of a mixture, but digits-claims is a single dataset"):
        federate(experiment.data, experiment.federation, 0)
