"""Baselines are federations: with one client, or with as many visits of each sample."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.engine.checkpoint import RunStore
from fedmllm.run.stages import pooled
from trained_runs import change


def test_one_client_with_all_data_equals_centralized_bit_for_bit(tmp_path: Path, tiny: Experiment) -> None:
    alone = change(
        tiny,
        federation={"num_clients": 1, "clients_per_round": 1, "num_rounds": 3},
        evaluation={"baselines": ["centralized"]},
        data={"num_train": 30},
    )
    result = train(alone, tmp_path / "run")
    federated, centralized = (load_file(tmp_path / "run" / "checkpoints" / f"{name}.safetensors") for name in ("federated", "centralized"))
    assert all(torch.equal(federated[name], centralized[name]) for name in federated)
    assert any(tensor.any() for name, tensor in federated.items() if "lora_B" in name)
    assert result.scores["federated"] == result.scores["centralized"]


def test_baselines_visit_each_sample_as_often_as_the_federation(tmp_path: Path, tiny: Experiment) -> None:
    """Under a buffered schedule the clients of a round are those in the buffer, not those at work."""
    federation = {"num_clients": 4, "clients_per_round": 4, "num_rounds": 4, "min_partition_size": 1}
    for schedule, rounds in ({"name": "synchronous"}, 4), ({"name": "buffered", "parameters": {"buffer": 2}}, 2):
        sections = {"federation": federation, "schedule": schedule, "evaluation": {"every": 0, "baselines": ["centralized"]}}
        train(change(tiny, **sections), tmp_path / str(rounds), report=False)
        assert len(RunStore(tmp_path / str(rounds)).records("centralized")) == rounds


def test_calibrated_baselines_are_plain_training_with_calibration(tmp_path: Path, tiny: Experiment) -> None:
    """A federation with one client and ``label_calibration`` equals calibrated centralized and calibrated local training."""
    alone = change(
        tiny,
        federation={"num_clients": 1, "clients_per_round": 1, "num_rounds": 2},
        evaluation={"baselines": ["local", "calibrated_local", "calibrated_centralized"]},
        data={"num_train": 30},
        algorithm={"name": "fedavg", "strategies": [{"name": "label_calibration", "parameters": {"strength": 0.5}}]},
    )
    result = train(alone, tmp_path / "run")
    names = ("federated", "calibrated_centralized", "calibrated_local-client-00", "local-client-00")
    federated, *calibrated, plain_logits = (load_file(tmp_path / "run" / "checkpoints" / f"{name}.safetensors") for name in names)
    for baseline in calibrated:
        assert all(torch.equal(federated[name], baseline[name]) for name in federated)
    assert not all(torch.equal(federated[name], plain_logits[name]) for name in federated)
    assert result.scores["calibrated_centralized"] == result.scores["calibrated_local_mean"] == result.scores["federated"]
    assert result.local == {"client-00": result.scores["local_mean"]}
    report, card = (tmp_path / "run" / "report.html").read_text(), (tmp_path / "run" / "adapter" / "README.md").read_text()
    for text in ("calibrated local mean", "calibrated centralized", "balanced accuracy"):
        assert text in report
        assert text in card


def test_with_one_client_the_global_prior_is_the_clients_prior(tmp_path: Path, tiny: Experiment) -> None:
    ended = []
    for given in (False, True):
        strategy = {"name": "label_calibration", "parameters": {"global_prior": given}}
        alone = change(
            tiny,
            federation={"num_clients": 1, "clients_per_round": 1},
            data={"num_train": 30},
            algorithm={"name": "fedavg", "strategies": [strategy]},
        )
        train(alone, tmp_path / str(given))
        ended.append(load_file(tmp_path / str(given) / "checkpoints" / "federated.safetensors"))
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_pooling_keeps_every_sample_once(federation: FederatedData) -> None:
    ((name, samples),) = pooled(federation.clients).items()
    assert name == "client-00"
    assert sorted(s.id for s in samples) == [s.id for s in samples] == sorted(s.id for c in federation.clients.values() for s in c)
