"""Audits: attacks find members of a run that memorizes, not those of a private one, and contradict a guarantee that does not hold."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmllm
from fedmllm.cli.tables import audit_lines
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.errors import RunError
from fedmllm.models.encoding import answer_nll, collate
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights, trainable, write_weights
from fedmllm.privacy.statement import PrivacyStatement
from fedmllm.reports.run_report import write_report
from fedmllm.run.audit import audit
from fedmllm.run.audit_result import Coin, audited
from fedmllm.run.evidence import cosines_along
from fedmllm.training.batches import Encoder
from fedmllm.types import Weights


def coins(members: list[bool], clients: int = 1) -> list[Coin]:
    """Samples of equal clients; every third has text only."""
    size = len(members) // clients
    return [Coin(f"c{i // size}", "text" if i % 3 == 0 else "image+text", member) for i, member in enumerate(members)]


def statement(epsilon: float, unit: str = "sample", guaranteed: bool = True) -> PrivacyStatement:
    return PrivacyStatement(unit, epsilon, 1e-5, 1.0, 0.1, None, "poisson", 10, 10, 0.1, guaranteed)


HALF = [bool(i % 2) for i in range(200)]
PERFECT = {"adapter": np.array([float(member) for member in HALF]), "updates": np.zeros(200)}


def test_an_attack_that_is_always_right_contradicts_a_small_epsilon() -> None:
    found = audited("sample", 0, coins(HALF), PERFECT, statement(1.0))
    assert found.attacks["adapter"].auc == 1.0
    assert (found.guesses, found.correct["adapter"]) == (50, 50)
    assert found.lower_bound == found.ceiling > 2
    assert found.contradicts
    assert "contradict" in audit_lines(found)[-1]


def test_the_same_attack_does_not_contradict_a_large_epsilon_or_no_guarantee() -> None:
    assert not audited("sample", 0, coins(HALF), PERFECT, statement(8.0)).contradicts
    for without in (None, statement(1.0, guaranteed=False), statement(1.0, unit="client")):
        found = audited("sample", 0, coins(HALF), PERFECT, without)
        assert found.epsilon is None
        assert not found.contradicts


def test_guesses_by_chance_contradict_nothing() -> None:
    """Of 200 audits with scores that know nothing, at most about 5% rule out an epsilon of 0."""
    rng = np.random.default_rng(0)
    bounds = []
    for _ in range(200):
        members = [bool(member) for member in rng.random(100) < 0.5]
        scores = {"adapter": rng.random(100), "updates": rng.random(100)}
        bounds.append(audited("sample", 0, coins(members), scores, statement(1.0)).lower_bound)
    assert np.mean(np.array(bounds) > 0) <= 0.08


def test_a_client_is_scored_by_the_mean_of_its_samples() -> None:
    members = [bool(i // 10 % 2) for i in range(200)]
    noisy = np.array(members, dtype=float) + np.random.default_rng(0).normal(0, 2, 200)
    scores = {"adapter": noisy, "updates": noisy}
    by_client = audited("client", 0, coins(members, 20), scores, None)
    by_sample = audited("sample", 0, coins(members, 20), scores, None)
    assert (by_client.units, by_sample.units) == (20, 200)
    assert by_client.attacks["adapter"].auc > by_sample.attacks["adapter"].auc > 0.5
    assert by_client.by_client == {}  # a client's samples are all members or all others


def test_success_is_listed_by_modality_and_client() -> None:
    """Samples with text only are memorized, the others are not."""
    kinds = coins(HALF, 4)
    scores = np.array([float(coin.member and coin.modalities == "text") for coin in kinds])
    found = audited("sample", 0, kinds, {"adapter": scores, "updates": scores}, None)
    assert (found.by_modality["text"].auc, found.by_modality["image+text"].auc) == (1.0, 0.5)
    assert found.by_client.keys() == {"c0", "c1", "c2", "c3"}
    assert sum(row.members for row in found.by_modality.values()) == 100


@pytest.mark.parametrize("whole", [True, False])
def test_cosines_are_those_of_gradients_one_by_one(
    whole: bool, vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData
) -> None:
    samples = [encoder(sample) for sample in federation.dataset.train[:5]]
    weights = read_weights(vlm.model)
    torch.manual_seed(0)
    change: Weights = {name: torch.randn_like(tensor) * (whole or "lora_B" in name) for name, tensor in weights.items()}
    found = cosines_along(vlm, samples, weights, change)
    write_weights(vlm.model, weights)
    own = dict(trainable(vlm.model))
    for sample, cosine in zip(samples, found, strict=True):
        vlm.model.zero_grad()
        (answer_nll(vlm, collate(vlm, [sample])).sum() / sample.answer_length).backward()  # type: ignore[no-untyped-call]
        names = [name for name in own if change[name].any()]
        gradient = torch.cat([own[name].grad.flatten() for name in names])  # type: ignore[union-attr]
        direction = torch.cat([change[name].flatten() for name in names])
        assert -torch.nn.functional.cosine_similarity(gradient, direction, dim=0).item() == pytest.approx(cosine, abs=1e-5)
    vlm.model.zero_grad()


def memorizing(tiny: Experiment, epochs: int = 40, **privacy: object) -> Experiment:
    """A run that trains so long that it memorizes its samples, unless privacy prevents it."""
    values = tiny.model_dump(mode="json")
    values["lora"]["r"] = 16
    values["training"] |= {"local_epochs": epochs, "learning_rate": 0.005, "batch_size": 8}
    values["federation"] |= {"clients_per_round": 3, "num_rounds": 4, "scenario": "aligned"}
    values["evaluation"]["every"] = 0
    return Experiment.parse(values | {"privacy": privacy})


@pytest.mark.slow
def test_a_run_that_memorizes_is_found_out(tiny: Experiment, tmp_path: Path) -> None:
    fedmllm.train(memorizing(tiny), tmp_path / "run")
    found = audit(tmp_path / "run")
    assert found.attacks["adapter"].auc > 0.7
    assert found.attacks["updates"].auc > 0.6


def test_an_audit_trains_on_half_and_continues(tiny: Experiment, tmp_path: Path) -> None:
    fedmllm.train(memorizing(tiny, epochs=1), tmp_path / "run")
    found = audit(tmp_path / "run")
    assert (found.unit, found.epsilon) == ("sample", None)
    assert found.attacks["adapter"].members + found.attacks["adapter"].others == found.units
    assert json.loads((tmp_path / "run/audit/audit.json").read_text())["attacks"]["adapter"]["auc"] == found.attacks["adapter"].auc
    assert "How well attacks tell members from others" in write_report(tmp_path / "run").read_text()
    manifest = json.loads((tmp_path / "run/audit/manifest.json").read_text())
    assert sum(client["num_samples"] for client in manifest["clients"]) == found.attacks["adapter"].members
    assert audit(tmp_path / "run") == found  # a second call continues the audit, which is finished
    with pytest.raises(RunError, match=r"an audit with unit and seed 'sample 0' was begun there; delete the folder, or use these values"):
        audit(tmp_path / "run", seed=1)


@pytest.mark.slow
def test_members_of_a_private_run_are_not_found(tiny: Experiment, tmp_path: Path) -> None:
    fedmllm.train(memorizing(tiny, unit="sample", target_epsilon=1.0, clip_norm=0.1), tmp_path / "run")
    found = audit(tmp_path / "run")
    assert found.epsilon is not None
    assert abs(found.attacks["adapter"].auc - 0.5) < 4 * found.attacks["adapter"].error
    assert not found.contradicts


@pytest.mark.slow
def test_an_audit_of_client_level_privacy_tosses_a_coin_for_each_client(tiny: Experiment, tmp_path: Path) -> None:
    found = memorizing(tiny, unit="client", target_epsilon=8.0, target_delta=1e-3)
    values = found.model_dump(mode="json")
    values["federation"] |= {"num_clients": 12, "clients_per_round": 12, "min_partition_size": 2}
    fedmllm.train(Experiment.parse(values), tmp_path / "run")
    result = audit(tmp_path / "run")
    assert (result.unit, result.units) == ("client", 12)
    assert result.epsilon == pytest.approx(8.0, abs=0.01)
    manifest = json.loads((tmp_path / "run/audit/manifest.json").read_text())
    assert sum(client["num_samples"] == 0 for client in manifest["clients"]) == result.attacks["adapter"].others


@pytest.mark.slow
def test_a_run_with_secure_aggregation_is_audited_by_what_it_releases(tiny: Experiment, tmp_path: Path) -> None:
    """Half of the clients are in the twin, which are fewer than a sum needs."""
    found = memorizing(tiny, epochs=1, unit="client", target_epsilon=8.0, target_delta=1e-3, secure_aggregation=True, noise="clients")
    values = found.model_dump(mode="json")
    values["federation"] |= {"num_clients": 12, "clients_per_round": 12, "min_partition_size": 2}
    fedmllm.train(Experiment.parse(values), tmp_path / "run")
    result = audit(tmp_path / "run")
    assert result.epsilon == pytest.approx(8.0, abs=0.01)
    lines = [json.loads(line) for line in (tmp_path / "run/audit/metrics.jsonl").read_text().splitlines()]
    assert not any(line["skipped"] for line in lines)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a finished run"):
        audit(tmp_path)
