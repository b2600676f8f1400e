"""A run of a personalized method, with scores for each client's models."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev

import pytest

from fedmllm.run.reader import Round, read_run
from fedmllm.run.scoring import score_adapter
from trained_runs import outcome

CLIENTS = ["client-00", "client-01", "client-02"]


def test_a_personalized_run_has_each_client_s_models(personalized: Path) -> None:
    assert sorted(path.name for path in (personalized / "adapters").iterdir()) == CLIENTS
    stages = {path.stem for path in (personalized / "checkpoints").glob("*.safetensors")}
    assert stages == {"federated", *(f"{kind}-{client}" for kind in ("local", "fine_tuned") for client in CLIENTS)}
    rounds = [line for line in read_run(personalized).lines if isinstance(line, Round)]
    took_part = {client for line in rounds if line.stage == "federated" for client in line.clients}
    kept = list((personalized / "checkpoints" / "federated-clients").glob("*/*.safetensors"))
    assert {path.parent.name for path in kept} == took_part
    assert {path.stem for path in kept} <= {"0", "1"}
    assert [line.stage for line in rounds].count("fine_tuned-client-00") == 1


def test_a_personalized_run_scores_each_client_s_own_model(personalized: Path) -> None:
    result = outcome(personalized)
    assert result.personalized
    scores = [score_adapter(personalized / "adapters" / client)[1]["score"] for client in CLIENTS]
    assert result.scores["federated"] == pytest.approx(mean(scores), abs=1e-9)
    assert result.standard_errors["federated"] == pytest.approx(stdev(scores) / 3**0.5, abs=1e-9)
    assert result.details["federated"]["num_samples"] == 3 * 24
    assert list(result.details) == ["federated", "local_mean"]
    assert {f"fine_tuned-{client}" for client in CLIENTS} < set(result.seconds_by_stage)


def test_each_clients_models_are_scored_on_its_kind_of_samples(personalized: Path) -> None:
    clients = outcome(personalized).clients
    assert {model: list(scores) for model, scores in clients.items()} == dict.fromkeys(("federated", "local", "fine_tuned"), CLIENTS)
    assert all(0 <= score <= 1 for scores in clients.values() for score in scores.values())
    report = (personalized / "report.html").read_text()
    assert "Each client on its own kind of samples" in report
    assert "fine-tuned mean" in report
