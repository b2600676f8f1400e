"""The privacy of runs: what a budget affords, what a run states, and what it costs to resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedmllm
from fedmllm.config import Experiment
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.stages import Stage
from fedmllm.errors import ConfigError
from fedmllm.privacy.accounting import Releases, epsilon
from fedmllm.privacy.ledger import Ledger
from fedmllm.reports.run_report import write_report
from fedmllm.run.privacy import LEDGER, PrivacyPlan, privacy_plan
from scripted import cut_short


def experiment(num_clients: int = 100, cohort: int = 10, rounds: int = 50, sampling: str = "cyclic", **privacy: object) -> Experiment:
    federation = {"num_clients": num_clients, "clients_per_round": cohort, "num_rounds": rounds, "sampling": sampling}
    return Experiment.parse({"federation": federation, "algorithm": {"name": "ffa_lora"}, "privacy": {"unit": "client"} | privacy})


def planned(*args: int, **settings: object) -> PrivacyPlan:
    plan = privacy_plan(experiment(*args, **settings))  # type: ignore[arg-type]
    assert plan is not None
    return plan


def stage(plan: PrivacyPlan) -> Stage:
    federation = plan.experiment.federation
    names = {f"client-{number:03}": () for number in range(federation.num_clients)}
    return Stage("federated", names, federation.num_rounds, federation.clients_per_round, sampling=federation.sampling)


@pytest.mark.parametrize("unit", ["client", "sample"])
def test_a_missing_library_is_an_error_before_work_begins(unit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"privacy needs dp-accounting; run pip install 'fedmllm\[privacy\]'"):
        privacy_plan(experiment(unit=unit, target_epsilon=8.0))


def test_no_privacy_has_no_plan() -> None:
    assert privacy_plan(Experiment()) is None


@pytest.mark.parametrize(("sampling", "expected"), [("cyclic", 11.48), ("poisson", 5.15)])
def test_the_cost_of_a_run_has_the_reference_value(sampling: str, expected: float, tmp_path: Path) -> None:
    """N = 100, m = 10, T = 50, z = 1, delta = 1e-5."""
    plan = planned(sampling=sampling, noise_multiplier=1.0)
    ledger, federation = Ledger(tmp_path / LEDGER), stage(plan)
    for number in range(50):
        plan.mechanism(tmp_path).spend("federated", number + 1, federation.cohort(0, number))
    assert len(ledger.lines()) == 50
    found = plan.statement(tmp_path)
    assert found.epsilon == pytest.approx(expected, abs=0.01)
    assert found.guaranteed
    assert (found.releases, found.participations) == (50, 5 if sampling == "cyclic" else 50)
    assert (sampling == "poisson") == ("nobody learns" in found.assumption)


def test_uniform_sampling_costs_the_largest_number_of_participations(tmp_path: Path) -> None:
    """It is known beforehand, because cohorts derive from the seed. With 11 of 50 rounds, epsilon is 19.00 at z = 1."""
    plan = planned(sampling="uniform", noise_multiplier=1.0)
    federation, mechanism = stage(plan), plan.mechanism(tmp_path)
    cohorts = [federation.cohort(0, number) for number in range(50)]
    most = max(sum(name in cohort for cohort in cohorts) for name in federation.clients)
    for number, cohort in enumerate(cohorts):
        mechanism.spend("federated", number + 1, cohort)
    assert plan.statement(tmp_path).epsilon == pytest.approx(epsilon([Releases(1.0, most)], 1e-5))
    assert 8 <= most <= 14


@pytest.mark.parametrize(("sampling", "expected"), [("cyclic", 1.342153), ("poisson", 0.8031)])
def test_the_noise_for_a_target_is_found(sampling: str, expected: float) -> None:
    assert planned(sampling=sampling, target_epsilon=8.0).noise_multiplier == pytest.approx(expected, abs=1e-3)


def test_a_budget_limits_the_rounds() -> None:
    """At z = 1, epsilon 8 affords k participations, hence rounds until a client would take part k + 1 times."""
    plan = planned(noise_multiplier=1.0, target_epsilon=8.0)
    allowed = next(k for k in range(1, 20) if epsilon([Releases(1.0, k + 1)], 1e-5) > 8)
    assert plan.limited(stage(plan)).federation.num_rounds == allowed * 10 < 50
    free = planned(noise_multiplier=1.0)
    assert free.limited(stage(free)).federation.num_rounds == 50


@pytest.mark.parametrize("sampling", ["cyclic", "uniform", pytest.param("poisson", marks=pytest.mark.slow)])
def test_a_repeated_round_costs_a_round(sampling: str, tmp_path: Path) -> None:
    """A crash after the first round's release makes the run repeat it. The budget then affords less, and the statement stays within it."""
    plan = planned(20, 10, 6, sampling=sampling, target_epsilon=4.0)
    federation, mechanism = stage(plan), plan.mechanism(tmp_path)
    assert plan.limited(federation, tmp_path).federation.num_rounds == 6
    mechanism.spend("federated", 1, federation.cohort(0, 0))
    rounds = plan.limited(federation, tmp_path, 0).federation.num_rounds
    assert rounds < 6
    for number in range(rounds):
        mechanism.spend("federated", number + 1, federation.cohort(0, number))
    assert plan.statement(tmp_path).epsilon <= 4.0


def test_a_budget_for_no_round_is_an_error_before_work_begins() -> None:
    with pytest.raises(ConfigError, match=r"target_epsilon: 1 affords no round with noise_multiplier 0.3; raise either of them"):
        planned(noise_multiplier=0.3, target_epsilon=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy.target_epsilon": None}, "noise_multiplier: null, and so is target_epsilon"),
        ({"privacy.unit": "none"}, "unit: none ignores target_epsilon"),
        ({"privacy.target_delta": 0.01}, "must be less than 1 / federation.num_clients = 0.01"),
        ({"algorithm.name": "flexlora"}, "does not work with flexlora, because the server needs individual updates.*use ffa_lora"),
        ({"algorithm.name": "ditto"}, "each client's own model"),
        ({"schedule.name": "buffered"}, "schedule buffered"),
        ({"federation.sampling": "poisson", "compression.name": "int8"}, "the size of updates reveals a secret cohort"),
        ({"federation.clients_per_round": 7}, "set clients_per_round to one of 1, 2, 4, 5, 10, 20, 25, 50, 100"),
        ({"privacy.unit": "none", "privacy.target_epsilon": None, "federation.sampling": "poisson"}, "only privacy.unit: client needs"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    values = experiment(target_epsilon=8.0).model_dump(mode="json")
    for path, value in changes.items():
        section, key = path.split(".")
        values[section][key] = value
    if changes.get("privacy.unit") == "none":
        values["privacy"] = {
            key: value for key, value in values["privacy"].items() if key in ("unit", "target_epsilon") and value is not None
        }
    with pytest.raises(ConfigError, match=message):
        Experiment.parse(values)


def small(folder: Path, **settings: object) -> Experiment:
    return Experiment.parse(
        {
            "data": {"num_train": 60, "num_test": 16, "validation_share": 0},
            "federation": {
                "num_clients": 4,
                "clients_per_round": 2,
                "num_rounds": 3,
                "sampling": "cyclic",
                "min_partition_size": 2,
                "partition": "iid",
            },
            "algorithm": {"name": "ffa_lora"},
            "lora": {"r": 2},
            "evaluation": {"baselines": [], "every": 0},
            "privacy": {"unit": "client", "target_epsilon": 8.0, **settings},
        }
    )


def test_a_run_states_its_privacy_in_result_card_and_report(tmp_path: Path) -> None:
    result = fedmllm.train(small(tmp_path), tmp_path / "run")
    assert result.privacy is not None
    assert result.privacy.epsilon <= 8.0
    assert result.privacy.summary == "epsilon 8.00 at delta 1e-05 for adding or removing one client"
    card = (tmp_path / "run/adapter/README.md").read_text()
    page = write_report(tmp_path / "run").read_text()
    for text in (card, page):
        for fact in ("epsilon 8.00", "delta 1e-05", "one client", "2 of 3 releases", "clipped to norm 0.1"):
            assert fact in text
    assert json.loads((tmp_path / "run/result.json").read_text())["privacy"]["guaranteed"] is True


@pytest.mark.slow
def test_a_run_with_a_noise_seed_has_no_guarantee_and_is_reproducible(tmp_path: Path) -> None:
    first, second = (fedmllm.train(small(tmp_path, noise_seed=3), tmp_path / name) for name in ("a", "b"))
    assert first.scores == second.scores
    adapters = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert adapters[0] == adapters[1]
    assert first.privacy is not None
    assert not first.privacy.guaranteed
    assert "No guarantee" in write_report(tmp_path / "a").read_text()
    assert "no privacy guarantee" in (tmp_path / "a/adapter/README.md").read_text()


@pytest.mark.slow
def test_two_runs_of_one_experiment_have_different_noise(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fedmllm.train(small(tmp_path), tmp_path / name)
    states = [RunStore(tmp_path / name).load_state("federated") for name in ("a", "b")]
    assert states[0] is not None
    assert states[1] is not None
    assert all(bool((states[0].weights[n] != states[1].weights[n]).any()) for n in states[0].weights if "lora_B" in n)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_ledger_and_stops_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cut_short(monkeypatch, after=1):
        fedmllm.train(small(tmp_path), tmp_path / "run")
    assert len(Ledger(tmp_path / "run" / LEDGER).lines()) == 2  # round 2 was released, but its state was lost
    result = fedmllm.train(small(tmp_path), tmp_path / "run", resume=True)
    assert result.privacy is not None
    assert result.privacy.epsilon <= 8.0
    assert result.num_rounds == len(RunStore(tmp_path / "run").records("federated"))
