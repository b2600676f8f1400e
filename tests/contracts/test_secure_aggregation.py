"""Every method and strategy under secure aggregation equals a step by the quantized mean, or is refused with a substitute."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmllm.algorithms import ALGORITHMS, STRATEGIES, Aggregate, Algorithm, AlgorithmConfig, ServerState, build_algorithm
from fedmllm.algorithms.base import ServerAverage
from fedmllm.algorithms.strategies.modality_coverage import coverage
from fedmllm.config import Experiment
from fedmllm.engine.base import Assignment
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.stages import Stage
from fedmllm.errors import ConfigError
from fedmllm.privacy.secagg.encoding import Encoding
from fedmllm.privacy.secagg.quantize import Weighted
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import UPDATE, Answer, ClientUpdate, Holding, Weights
from scripted import Clients, Scripted, secured, unscored
from server_rounds import COUNTS, STEPS, begin, updates

REFUSED = {
    "median",
    "trimmed_mean",
    "krum",
    "fednova",
    "hetlora",
    "fedilora",
    "flora",
    "fedmllm",
    "flexlora",
    "calibrated_flexlora",
    "fedex_lora",
    "yoco",
}
REWEIGHING = "modality_coverage"
NAMES = [f"c{k}" for k in range(len(COUNTS))]
SCALE = 2**30 / 4


@dataclass
class Random(Scripted):
    algorithm: Algorithm = field(default_factory=ServerAverage)

    def answers(self, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
        received = assignment.broadcast
        yield from sent(self.algorithm, ServerState(received.weights, received.round_num))


def sent(algorithm: Algorithm, state: ServerState) -> list[ClientUpdate]:
    """Updates of clients that cover two modalities differently."""
    return [replace(update, profile={"image": 1, "image+text": k + 1}) for k, update in enumerate(updates(algorithm, state))]


def configured(name: str, strategies: tuple[str, ...]) -> AlgorithmConfig:
    return AlgorithmConfig(name=name, strategies=strategies)


def quantized(tensors: list[Weights], shares: list[float]) -> dict[str, torch.Tensor]:
    """The mean of tensors with shares that sum to 1, rounded to multiples of 4 / 2^30. Sums are exact, in Python's integers."""
    found = {}
    for name in tensors[0]:
        rows = [(t[name].double().numpy() * (share * SCALE)).round().astype(np.int64) for t, share in zip(tensors, shares, strict=True)]
        total = np.array([sum(map(int, column)) for column in zip(*(row.ravel() for row in rows), strict=True)], np.float64)
        found[name] = torch.from_numpy(total / SCALE / math.fsum(shares)).reshape(tensors[0][name].shape)
    return found


@pytest.mark.parametrize(
    "strategies", [(), (REWEIGHING,), tuple(s for s, cls in STRATEGIES.items() if cls.wording is None and s != REWEIGHING)]
)
@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - REFUSED))
def test_a_round_is_a_step_by_the_quantized_mean(name: str, strategies: tuple[str, ...], tmp_path: Path) -> None:
    algorithm = build_algorithm(configured(name, strategies))
    engine = Random(algorithm=algorithm)
    reported = {client: Holding(100, {"image": 40, "image+text": 60}) for client in NAMES}
    stage = Stage("federated", dict.fromkeys(NAMES, ()), 2, 5, reported=reported)
    state = replace(begin(algorithm), population=replace(stage.population, labels={}))
    expected = state
    for _ in range(2):
        clients = sent(algorithm, expected)
        weights = [1.0 if ALGORITHMS[name]().uniform_weights else float(count) for count in COUNTS]
        if REWEIGHING in strategies:
            factors = [coverage(client.profile, stage.population.profile) for client in clients]
            weights = [weight * float(Fraction(factor)) for weight, factor in zip(weights, factors, strict=True)]
        shares = [weight / math.fsum(weights) for weight in weights]
        mean: dict[str, Any] = {UPDATE: quantized([client.update for client in clients], shares)}
        for kind in algorithm.client_sends:
            mean[kind] = quantized([dict(client.extras[kind]) for client in clients], [1 / 5] * 5)
        expected = algorithm.server_step(expected, Aggregate(mean, 5))
    secure = secured(engine, tmp_path, NAMES, Encoding(Weighted(4.0)))
    loop = Loop(algorithm, engine, TrainingConfig(), unscored(), RunStore(tmp_path), 0, failures=FailureConfig(), secure=secure)
    found = run_stage(loop, stage, begin(algorithm))
    assert [record["refused"] for record in RunStore(tmp_path).records()] == [[], []]
    for slots, wanted in ((found.weights, expected.weights), *((found.slots[kind], expected.slots[kind]) for kind in expected.slots)):
        assert all(torch.equal(slots[key], tensor) for key, tensor in wanted.items())


def settings(**sections: Any) -> Experiment:
    federation = {"num_clients": 6, "clients_per_round": 4, **sections.pop("federation", {})}
    privacy = {"secure_aggregation": True, **sections.pop("privacy", {})}
    return Experiment.parse({"federation": federation, "privacy": privacy, **sections})


def refusal(**sections: Any) -> str:
    with pytest.raises(ConfigError) as error:
        settings(**sections)
    return str(error.value)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_an_experiment_accepts_exactly_the_methods_that_need_only_sums(name: str) -> None:
    if name not in REFUSED:
        settings(algorithm={"name": name})
        return
    said = refusal(algorithm={"name": name}, federation={"clients_per_round": 6})
    assert f"privacy.secure_aggregation does not work with {name}, because the server" in said
    assert "; use " in said


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"compression": {"name": "int8"}},
            "compression.name: with privacy.secure_aggregation, compressed updates cannot be added; set it to none",
        ),
        (
            {"schedule": {"name": "buffered"}},
            "schedule.name: with privacy.secure_aggregation, a sum needs the clients of one round; set it to synch",
        ),
        ({"engine": {"name": "flower"}}, "engine.name: workers on this machine have no keys of their own"),
        (
            {"federation": {"clients_per_round": 1}},
            "federation.clients_per_round: 1, but privacy.secure_aggregation needs sums of at least 2",
        ),
        (
            {"privacy": {"min_clients": 5}},
            "federation.clients_per_round: 4, but privacy.secure_aggregation needs sums of at least 5 clients",
        ),
        ({"privacy": {"min_clients": 1}}, "privacy.min_clients: must be at least 2, got 1"),
        ({"privacy": {"secure_aggregation": False, "min_clients": 3}}, "only secure_aggregation has sums of at least so many clients"),
        ({"privacy": {"noise": "clients"}}, "noise: clients protects nothing without secure_aggregation: true and unit: client"),
        ({"privacy": {"assumed_colluders": 1}}, "assumed_colluders: 1, but noise: server is added by nobody who colludes"),
    ],
)
def test_what_contradicts_sums_is_refused_at_construction(sections: dict[str, Any], said: str) -> None:
    assert said in refusal(**sections)


@pytest.mark.parametrize(
    ("federation", "privacy", "said"),
    [
        ({"sampling": "poisson"}, {}, "federation.sampling: with privacy.secure_aggregation, clients learn each other's names"),
        ({}, {"clip_quantile": 0.5}, "privacy.clip_quantile: with privacy.secure_aggregation, clients do not send its bits"),
        ({}, {"noise": "clients", "assumed_colluders": 3}, "privacy.assumed_colluders: must be less than min_clients, 3, got 3"),
    ],
)
def test_what_contradicts_private_sums_is_refused(federation: dict[str, Any], privacy: dict[str, Any], said: str) -> None:
    private = {"unit": "client", "noise_multiplier": 1.0, **privacy}
    assert said in refusal(federation=federation, privacy=private, algorithm={"name": "ffa_lora"})


def test_different_ranks_are_refused() -> None:
    assert "needs the same rank" in refusal(lora={"client_ranks": [2, 8]})
    assert "hetlora" in refusal(lora={"client_ranks": [2, 8]}, algorithm={"name": "hetlora"})


@pytest.mark.parametrize(("cohort", "least"), [(2, 2), (3, 3), (4, 3), (5, 4), (10, 7)])
def test_sums_have_by_default_as_many_clients_as_unmasking_a_full_cohort_needs(cohort: int, least: int) -> None:
    experiment = settings(federation={"num_clients": 10, "clients_per_round": cohort})
    assert experiment.privacy.smallest_sum(cohort) == least
    assert len(STEPS) == len(COUNTS)
