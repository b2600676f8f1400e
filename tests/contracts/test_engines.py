"""Every method on every engine gives the same cohorts, updates and final weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmllm import api as run
from fedmllm.algorithms import ALGORITHMS, STRATEGIES
from fedmllm.config import Experiment
from fedmllm.engine.checkpoint import RunStore
from fedmllm.run import federation, worker
from fedmllm.run.resident import Resident

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from loopback import loopback
from tiny_families import folder_of

RESIDENT = Resident()
"""For the server's side; the worker has its own."""


@pytest.fixture(autouse=True)
def through_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "simulation", partial(loopback))
    monkeypatch.setattr(federation, "require_flower", lambda *modules: None)


def experiment(name: str, engine: str, **sections: Any) -> Experiment:
    parameters = {"server_learning_rate": 0.01} if name.startswith("feda") and name not in ("fedavg", "fedavgm") else {}
    # Left out: strategies that set a wording, which belongs to the data, and strategies for weights that the method ignores.
    strategies = [s for s, cls in STRATEGIES.items() if cls.wording is None and not (cls().reweighs and ALGORITHMS[name].ignores_weights)]
    values: dict[str, Any] = {
        # Messages do not depend on the model's width.
        "model": {"name": folder_of("llava")},
        "data": {"dataset": "digits-claims", "num_train": 40, "num_test": 8, "check_images": False},
        "federation": {"num_clients": 6, "clients_per_round": 5, "num_rounds": 2, "scenario": "missing-0.3", "min_partition_size": 3},
        "algorithm": {"name": name, "parameters": parameters, "strategies": strategies},
        "training": {"batch_size": 4, "learning_rate": 3e-3},
        "evaluation": {"every": 0, "baselines": []},
        "engine": {"device": "cpu", "parallel_clients": 1, "name": engine},
    }
    if ALGORITHMS[name].heterogeneous_ranks:
        values["lora"] = {"client_ranks": [2, 8, 4]}
    return Experiment.parse(values | sections)


def ends(settings: Experiment, folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, Any]]:
    """The adapter, the round records without their times, and the scores."""
    result = run.train(settings, folder, resident=RESIDENT, report=False)
    rounds = [{k: v for k, v in record.items() if k != "seconds"} for record in RunStore(folder).records("federated")]
    return load_file(folder / "adapter" / "adapter_model.safetensors"), rounds, result.scores


QUICK = {"calibrated_flexlora", "ditto", "fedadam", "fedavg", "fedsa_lora", "flora", "hetlora", "scaffold"}
"""Methods of each kind of message; the others run with the slow tests."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted(ALGORITHMS)])
def test_a_federation_ends_the_same_in_one_process_and_over_messages(name: str, tmp_path: Path) -> None:
    """Bit for bit. Byte counts are equal too."""
    here, rounds, scores = ends(experiment(name, "in_process"), tmp_path / "here")
    there, other_rounds, others = ends(experiment(name, "flower"), tmp_path / "there")
    assert here.keys() == there.keys()
    assert all(torch.equal(there[key], tensor) for key, tensor in here.items())
    assert (other_rounds, others) == (rounds, scores)
    assert not any(record["refused"] for record in rounds)


def test_the_global_prior_is_the_same_in_one_process_and_over_messages(tmp_path: Path) -> None:
    """It differs from a client's own prior."""
    ended = []
    for parameters in ({"global_prior": True}, {}):
        method = {"name": "fedavg", "strategies": [{"name": "label_calibration", "parameters": parameters}]}
        here, there = (
            ends(experiment("fedavg", engine, algorithm=method), tmp_path / f"{engine}-{len(parameters)}")[0]
            for engine in ("in_process", "flower")
        )
        assert all(torch.equal(there[key], tensor) for key, tensor in here.items())
        ended.append(here)
    assert not all(torch.equal(ended[0][key], tensor) for key, tensor in ended[1].items())


@pytest.mark.parametrize(
    ("codec", "name"),
    [
        ("int4", "scaffold"),
        ("top_k", "flexlora"),
        *(pytest.param(codec, "scaffold", marks=pytest.mark.slow) for codec in ("bfloat16", "int8", "top_k")),
    ],
)
def test_compressed_updates_travel_compressed(codec: str, name: str, tmp_path: Path) -> None:
    compression = {"name": codec}
    here, rounds, _ = ends(experiment(name, "in_process", compression=compression), tmp_path / "here")
    there, other_rounds, _ = ends(experiment(name, "flower", compression=compression), tmp_path / "there")
    assert all(torch.equal(there[key], tensor) for key, tensor in here.items())
    assert other_rounds == rounds


@pytest.mark.parametrize(("sampling", "cohort"), [("cyclic", 3), pytest.param("uniform", 5, marks=pytest.mark.slow), ("poisson", 2)])
def test_private_rounds_are_the_same_in_one_process_and_over_messages(sampling: str, cohort: int, tmp_path: Path) -> None:
    """With predictable noise, for this test only. A secret cohort may be empty."""
    privacy = {"unit": "client", "noise_multiplier": 0.5, "noise_seed": 3}
    sections: dict[str, Any] = {"privacy": privacy, "algorithm": {"name": "ffa_lora"}}
    settings = [experiment("ffa_lora", engine, **sections).model_dump(mode="json") for engine in ("in_process", "flower")]
    for one in settings:
        one["federation"] |= {"sampling": sampling, "clients_per_round": cohort, "num_rounds": 3}
    (here, rounds, _), (there, other_rounds, _) = (ends(Experiment.parse(one), tmp_path / str(i)) for i, one in enumerate(settings))
    assert all(torch.equal(there[key], tensor) for key, tensor in here.items())
    assert other_rounds == rounds
    ledgers = [(tmp_path / str(i) / "privacy.jsonl").read_text() for i in (0, 1)]
    assert ledgers[0] == ledgers[1]
    assert ledgers[0].count("\n") == 3


@pytest.mark.slow
def test_clients_that_protect_samples_do_so_over_messages(tmp_path: Path) -> None:
    """Workers write the run's ledger, with the noise that the smallest client needs."""
    privacy = {"unit": "sample", "target_epsilon": 8.0}
    settings = experiment("fedavg", "flower", privacy=privacy, algorithm={"name": "fedavg"})
    result = run.train(settings, tmp_path / "run", resident=RESIDENT, report=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "privacy.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 5
    assert result.privacy is not None
    assert {line["noise_multiplier"] for line in lines} == {result.privacy.noise_multiplier}
    assert 0 < (result.privacy.epsilon or 0) <= 8.0


def test_a_worker_serves_several_runs_in_a_row(tmp_path: Path) -> None:
    """The second run has other settings; the third repeats the first."""
    settings = [experiment("fedavg", "flower"), experiment("fedprox", "flower"), experiment("fedavg", "flower")]
    first, _, third = (ends(one, tmp_path / str(i))[0] for i, one in enumerate(settings))
    assert all(torch.equal(third[key], tensor) for key, tensor in first.items())
    assert len(worker._WORKER) == 1
