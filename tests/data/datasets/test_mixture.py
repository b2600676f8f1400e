from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fedmllm.config import Experiment
from fedmllm.data.datasets import Dataset, DatasetRequest, load_dataset
from fedmllm.data.federated import FederatedData, federate
from fedmllm.errors import ConfigError
from fedmllm.evaluation.metrics import all_metrics, majority_score, score
from fedmllm.types import Prediction

MEDICAL = [{"dataset": "digits-vqa", "num_train": 60, "num_test": 20}, {"dataset": "digits-cards", "num_train": 40, "num_test": 20}]
TASKS = [{"dataset": "digits-claims", "num_train": 60, "num_test": 30}, {"dataset": "digits-vqa", "num_train": 60, "num_test": 20}]


def mixture(parts: list[dict[str, Any]], **settings: Any) -> Dataset:
    return load_dataset("mixture", DatasetRequest(None, 0, options={"parts": parts}, **settings))


def federated(parts: list[dict[str, Any]], **federation: Any) -> FederatedData:
    settings = {"num_clients": 4, "min_partition_size": 4, **federation}
    experiment = Experiment.parse({"data": {"dataset": "mixture", "options": {"parts": parts}}, "federation": settings})
    return federate(experiment.data, experiment.federation, 0)


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


def test_under_cross_a_client_holds_the_one_or_the_other() -> None:
    data = federated(MEDICAL, scenario="cross-5:5")
    held = Counter(next(iter({sample.domain for sample in samples})) for samples in data.clients.values())
    assert held == {"digits-vqa": 2, "digits-cards": 2}
    assert sum(map(len, data.clients.values())) + data.dropped == 100


def test_a_task_mix_is_scored_by_the_mean_of_each_task_s_own_score() -> None:
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
        (MEDICAL[:1], r"data\.options\.parts: Tuple should have at least 2 items"),
        ([MEDICAL[0], {"dataset": "digit-cards"}], "'digit-cards' is no dataset that can be mixed"),
        ([MEDICAL[0], {"dataset": "mixture"}], "'mixture' is no dataset that can be mixed"),
        ([MEDICAL[0], MEDICAL[0]], "'digits-vqa' is named 2 times"),
        ([MEDICAL[0], {"dataset": "digits-cards", "folder": "x"}], r"data\.options\.parts\.1\.folder"),
    ],
)
def test_what_cannot_be_mixed(parts: list[dict[str, Any]], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        mixture(parts)


def test_sizes_are_the_parts_own() -> None:
    with pytest.raises(ConfigError, match="give num_train and num_test to the parts"):
        mixture(MEDICAL, num_train=10)


def test_a_domain_partition_needs_a_mixture() -> None:
    experiment = Experiment.parse({"data": {"num_train": 40, "num_test": 8}, "federation": {"partition": "domain", "num_clients": 4}})
    with pytest.raises(ConfigError, match="spreads the datasets of a mixture, digits-claims is a single dataset"):
        federate(experiment.data, experiment.federation, 0)
