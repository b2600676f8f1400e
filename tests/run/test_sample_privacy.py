"""Runs that protect single samples: the noise for the smallest client, the rounds that all can afford, and what the run states."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedmllm
from fedmllm.config import Experiment
from fedmllm.engine.stages import Stage
from fedmllm.errors import ConfigError, RunError
from fedmllm.privacy.accounting import epsilon
from fedmllm.privacy.ledger import LEDGER, Ledger
from fedmllm.privacy.sample_level import SampleBudget, noise_for, releases
from fedmllm.reports.run_report import write_report
from fedmllm.run.sample_privacy import sample_plan
from fedmllm.types import Sample

SAMPLE = Sample("s", "?", "a", {"text": "t"})
SIZES = {"a": 40, "b": 200, "c": 80}


def experiment(rounds: int = 3, sampling: str = "uniform", cohort: int = 3, **privacy: object) -> Experiment:
    federation = {"num_clients": 3, "clients_per_round": cohort, "num_rounds": rounds, "sampling": sampling}
    training = {"batch_size": 8, "local_epochs": 2}
    return Experiment.parse({"federation": federation, "training": training, "privacy": {"unit": "sample", **privacy}})


def stage(found: Experiment) -> Stage:
    federation = found.federation
    clients = {name: (SAMPLE,) * size for name, size in SIZES.items()}
    return Stage("federated", clients, federation.num_rounds, federation.clients_per_round, sampling=federation.sampling)


@pytest.mark.parametrize("trainings", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_noise_is_enough_for_the_smallest_client(trainings: int) -> None:
    """A client with few samples draws each of them often."""
    found = experiment(target_epsilon=4.0)
    plan = sample_plan(found, stage(found), trainings)
    assert plan.noise_multiplier == noise_for(4.0, 1e-5, found.training, 40, 3 * trainings)
    costs = [epsilon([releases(plan.noise_multiplier, found.training, size, 3 * trainings)], 1e-5) for size in SIZES.values()]
    assert max(costs) == costs[0] <= 4.0
    assert plan.limited(stage(found)).federation.num_rounds == 3


@pytest.mark.slow
def test_a_budget_limits_the_rounds_to_what_all_clients_can_afford() -> None:
    found = experiment(rounds=20, target_epsilon=8.0, noise_multiplier=1.0)
    rounds = sample_plan(found, stage(found), 1).limited(stage(found)).federation.num_rounds
    assert 0 < rounds < 20
    assert (
        epsilon([releases(1.0, found.training, 40, rounds)], 1e-5) <= 8.0 < epsilon([releases(1.0, found.training, 40, rounds + 1)], 1e-5)
    )


def test_trainings_that_were_repeated_count(tmp_path: Path) -> None:
    found = experiment(target_epsilon=4.0)
    plan = sample_plan(found, stage(found), 1)
    steps = plan.steps(tmp_path)
    assert steps is not None
    for _ in range(2):  # the first round, and the same round again after a crash
        steps.spend("a", 10, 0.2)
    assert plan.limited(stage(found), tmp_path, 0).federation.num_rounds == 1


def test_a_training_beyond_the_budget_is_refused_before_it_is_recorded(tmp_path: Path) -> None:
    budget = SampleBudget(Ledger(tmp_path / LEDGER), 1.0, 3.0, 1e-5)
    budget.spend("a", 10, 0.1)
    with pytest.raises(
        RunError, match=r"the privacy budget of a is spent: .* epsilon .* target_epsilon is 3 \(privacy.jsonl\); raise target_epsilon"
    ):
        budget.spend("a", 10_000, 0.1)
    budget.spend("b", 10, 0.1)  # another client has a budget of its own
    assert [line["client"] for line in budget.ledger.lines()] == ["a", "b"]


def test_several_runs_share_the_budget_of_a_ledger(tmp_path: Path) -> None:
    for _ in range(3):
        SampleBudget(Ledger(tmp_path / LEDGER), 1.0, 100.0, 1e-5).spend("a", 100, 0.1)
    assert len(SampleBudget(Ledger(tmp_path / LEDGER), 1.0, 100.0, 1e-5).spent("a")) == 3


def test_a_delta_that_allows_one_sample_to_be_revealed_is_refused() -> None:
    found = experiment(target_epsilon=4.0, target_delta=0.005)
    with pytest.raises(ConfigError, match="must be less than 1 / 200, because a client holds 200 samples"):
        sample_plan(found, stage(found), 1)


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"name": "scaffold"}, "records gradients before clipping"),
        ({"strategies": ["label_calibration"]}, "loss term Calibration"),
        ({"strategies": ["feature_alignment"]}, "loss term alignment"),
        ({"strategies": ["modality_coverage"]}, "clients must report their profile"),
    ],
)
def test_methods_that_use_samples_otherwise_are_refused_before_work_begins(
    algorithm: dict[str, object], message: str, embedded: Experiment, tmp_path: Path
) -> None:
    values = {**embedded.model_dump(mode="json"), "algorithm": algorithm, "privacy": {"unit": "sample", "target_epsilon": 8.0}}
    with pytest.raises(ConfigError, match=message):
        fedmllm.train(Experiment.parse(values), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_states_the_privacy_of_the_client_that_spent_the_most(embedded: Experiment, tmp_path: Path) -> None:
    values = embedded.model_dump(mode="json") | {"privacy": {"unit": "sample", "target_epsilon": 8.0, "clip_norm": 0.5}}
    result = fedmllm.train(Experiment.parse(values), tmp_path / "run")
    lines = Ledger(tmp_path / "run" / LEDGER).lines()
    assert result.privacy is not None
    assert {line["client"] for line in lines} >= {"client-00"}
    assert 0 < (result.privacy.epsilon or 0) <= 8.0
    page = write_report(tmp_path / "run").read_text()
    for fact in ("for adding or removing one sample", "gradients of single samples", "clipped to norm 0.5"):
        assert fact in page
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"losses": {}' in metrics
