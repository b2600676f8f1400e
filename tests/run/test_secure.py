"""Runs with secure aggregation in one process: what they compute, state and keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmllm.api import train
from fedmllm.cli.tables import result_table
from fedmllm.config import Experiment
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.parties import Parties
from fedmllm.engine.secure import FACTS
from fedmllm.errors import ConfigError, FederationError
from fedmllm.privacy.secagg.messages import Message
from fedmllm.privacy.statement import SecureStatement
from fedmllm.reports.run_report import write_report
from fedmllm.run.privacy import privacy_plan
from fedmllm.run.reader import read_run
from fedmllm.run.resident import Resident
from fedmllm.run.secure import encoding, secure_plan

RESIDENT = Resident()
FEDERATION = {"num_clients": 4, "clients_per_round": 4, "num_rounds": 2, "min_partition_size": 5}


def experiment(tiny: Experiment, **sections: Any) -> Experiment:
    values = tiny.model_dump(mode="json") | {"federation": FEDERATION, "evaluation": {"every": 0, "baselines": []}}
    privacy = {"secure_aggregation": True, **sections.pop("privacy", {})}
    return Experiment.parse(values | {"privacy": privacy} | sections)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losing(monkeypatch: pytest.MonkeyPatch, names: set[str], stage: str, rounds: tuple[int, ...] = (1,)) -> None:
    """Let clients fail in a stage of some rounds, by default the second."""
    answer = Parties.answer

    def failing(parties: Parties, client: str, step: str, message: Message) -> Message:
        if client in names and step == stage and parties._held[client].round_id.round_num in rounds:
            raise FederationError("the connection is lost")
        return answer(parties, client, step, message)

    monkeypatch.setattr(Parties, "answer", failing)


@pytest.mark.parametrize(
    "method", ["fedavg", "scaffold", pytest.param("rolora", marks=pytest.mark.slow), pytest.param("fedsa_lora", marks=pytest.mark.slow)]
)
def test_a_secure_run_ends_as_a_plain_one_up_to_rounding(method: str, tiny: Experiment, tmp_path: Path) -> None:
    secure = experiment(tiny, algorithm={"name": method})
    plain = secure.model_copy(update={"privacy": tiny.privacy})
    for name, settings in (("secure", secure), ("plain", plain)):
        train(settings, tmp_path / name, resident=RESIDENT, report=False)
    for path in sorted((tmp_path / "plain").rglob("adapter_model.safetensors")):
        here, there = load_file(path), load_file(tmp_path / "secure" / path.relative_to(tmp_path / "plain"))
        for name, tensor in here.items():
            # A round changes an entry by 6e-3; one unit of the integers is 4e-9. Training amplifies the difference a little.
            torch.testing.assert_close(there[name], tensor, atol=2e-5, rtol=0)
    assert json.loads((tmp_path / "plain" / "result.json").read_text())["secure"] is None


def test_baselines_train_without_secure_aggregation(tiny: Experiment, tmp_path: Path) -> None:
    train(experiment(tiny, evaluation={"every": 0, "baselines": ["centralized"]}), tmp_path / "run", resident=RESIDENT, report=False)
    found = {record["stage"]: FACTS in record for record in RunStore(tmp_path / "run").records()}
    assert found == {"federated": True, "centralized": False}


def test_what_a_client_keeps_counts_only_if_it_is_in_the_sum(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The personalized model of the client that leaves is the one from the first round."""
    losing(monkeypatch, {"client-02"}, "masked")
    train(experiment(tiny, algorithm={"name": "ditto"}), tmp_path / "run", resident=RESIDENT, report=False)
    store = RunStore(tmp_path / "run")
    state = store.load_state("federated")
    assert state is not None
    assert {name: list(rounds) for name, rounds in state.accepted.items()} == {
        **{f"client-{k:02}": [0, 1] for k in (0, 1, 3)},
        "client-02": [0],
    }
    kept = load_file(tmp_path / "run" / "adapters" / "client-02" / "adapter_model.safetensors")
    first = store.client_states("federated").load("client-02", [0])["personal"]
    assert {tuple(t.shape) for t in kept.values()} == {tuple(t.shape) for t in first.values()}
    assert sorted(float(t.double().sum()) for t in kept.values()) == sorted(float(t.double().sum()) for t in first.values())


def test_a_skipped_round_is_in_metrics_report_and_statement(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, {"client-01", "client-02"}, "survivors")
    result = train(experiment(tiny), tmp_path / "run", resident=RESIDENT, report=False)
    reason = "needs at least 3 clients after stage survivors, but 2 are left; the round is skipped"
    first, second = RunStore(tmp_path / "run").records("federated")
    assert (first["skipped"], second["skipped"]) == (False, True)
    assert reason in second[FACTS]["failed"]
    assert "the connection is lost" not in second[FACTS]["failed"]
    assert result.secure == SecureStatement(3, 1, 1, simulated=True)
    page = write_report(tmp_path / "run").read_text()
    assert reason in page
    assert "left secure aggregation in stage survivors: the connection is lost" in page
    assert read_run(tmp_path / "run").result == result


def test_a_run_without_any_sum_is_an_error(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its adapter would be untrained. The run ends without an error if failures.below is skip."""
    losing(monkeypatch, {"client-00", "client-01", "client-02"}, "survivors", (0, 1))
    with pytest.raises(
        FederationError, match=r"(?s)no round has a sum, because every session .* failed:.*needs at least 3 clients.*fix the causes"
    ):
        train(experiment(tiny), tmp_path / "run", resident=RESIDENT, report=False)
    assert not (tmp_path / "run" / "result.json").exists()


def test_the_statement_of_a_simulation_says_that_it_hid_nothing(tiny: Experiment, tmp_path: Path) -> None:
    result = train(experiment(tiny), tmp_path / "run", resident=RESIDENT, report=False)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "This was a simulation: clients and server were one process, which held all updates." in card
    assert "neither differential privacy nor secure aggregation" not in card
    assert result.secure is not None
    assert result.secure.summary in str(result_table(result).caption)


@pytest.mark.parametrize(("noise", "said"), [("clients", "epsilon also holds against the server"), ("server", "not against the server")])
def test_a_private_secure_run_says_against_whom_epsilon_holds(noise: str, said: str, tiny: Experiment, tmp_path: Path) -> None:
    privacy = {"unit": "client", "noise": noise, "noise_multiplier": 1.0}
    result = train(experiment(tiny, privacy=privacy, algorithm={"name": "ffa_lora"}), tmp_path / "run", resident=RESIDENT, report=False)
    assert result.privacy is not None
    assert result.secure is not None
    assert (result.privacy.releases, result.secure.noise) == (2, noise)
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert said in card
    assert result.privacy.summary in card
    assert all(not record["losses"] and record["num_samples"] == 0 for record in RunStore(tmp_path / "run").records())


def test_a_simulation_with_a_noise_seed_repeats_and_has_no_guarantee(tiny: Experiment, tmp_path: Path) -> None:
    privacy = {"unit": "client", "noise": "clients", "noise_multiplier": 1.0, "noise_seed": 3}
    settings = experiment(tiny, privacy=privacy, algorithm={"name": "ffa_lora"})
    results = [train(settings, tmp_path / str(i), resident=RESIDENT, report=False) for i in range(2)]
    assert all(torch.equal(adapter(tmp_path / "1")[name], tensor) for name, tensor in adapter(tmp_path / "0").items())
    assert results[0].privacy is not None
    assert not results[0].privacy.guaranteed


@pytest.mark.slow
def test_samples_can_be_protected_in_a_secure_run(tiny: Experiment, tmp_path: Path) -> None:
    privacy = {"unit": "sample", "noise_multiplier": 1.0, "target_delta": 1e-3}
    result = train(experiment(tiny, privacy=privacy), tmp_path / "run", resident=RESIDENT, report=False)
    assert result.privacy is not None
    assert result.secure is not None
    assert result.secure.noise is None
    assert [record["skipped"] for record in RunStore(tmp_path / "run").records()] == [False, False]


def test_noise_that_is_too_small_for_integers_is_refused_before_the_run(tiny: Experiment, tmp_path: Path) -> None:
    privacy = {"unit": "client", "noise": "clients", "noise_multiplier": 1e-9}
    with pytest.raises(ConfigError, match="deviation of at least 16 integer units"):
        train(experiment(tiny, privacy=privacy, algorithm={"name": "ffa_lora"}), tmp_path / "run", resident=RESIDENT)
    assert not (tmp_path / "run").exists()


def test_noise_of_clients_suffices_without_colluders(tiny: Experiment) -> None:
    """Any min_clients - h clients together have noise of variance (z C)^2, in units of the scale."""
    privacy = {"unit": "client", "noise": "clients", "noise_multiplier": 1.5, "clip_norm": 0.2, "assumed_colluders": 1}
    settings = experiment(tiny, privacy=privacy, algorithm={"name": "ffa_lora"})
    plan = privacy_plan(settings)
    assert plan is not None
    found = secure_plan(settings, plan.noise_multiplier)
    assert found is not None
    quantizer: Any = found.encoding.quantizer
    honest = found.min_clients - 1
    assert honest * (quantizer.deviation / quantizer.scale) ** 2 == pytest.approx((1.5 * 0.2) ** 2)
    assert encoding(settings, plan.noise_multiplier).noisy


@pytest.mark.parametrize(
    ("cohort", "said"), [(3, "no client of 3 may leave"), (4, "1 of 4 clients may leave"), (10, "3 of 10 clients may leave")]
)
def test_a_run_says_before_it_begins_how_many_clients_may_leave(cohort: int, said: str, tiny: Experiment) -> None:
    plan = secure_plan(experiment(tiny, federation={"num_clients": 10, "clients_per_round": cohort}), None)
    assert plan is not None
    assert said in plan.announcement


def test_names_of_clients_are_limited(tiny: Experiment, tmp_path: Path) -> None:
    settings = experiment(tiny)
    plan = secure_plan(settings, None)
    assert plan is not None
    loop: Any = None
    engine: InProcessEngine = None  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="names of clients have at most 64 characters"):
        plan.simulated(loop, engine, "run", tmp_path, ["a" * 65])
