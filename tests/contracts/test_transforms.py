"""The guarantees of update transforms: every method trains with them, every engine applies them, and clients keep their state."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmllm import api as run
from fedmllm.algorithms import (
    ALGORITHMS,
    STRATEGIES,
    Aggregate,
    AlgorithmConfig,
    ClientContext,
    ServerState,
    UpdateTransform,
    build_algorithm,
)
from fedmllm.algorithms.strategies import Strategy
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.compression import CompressionConfig, compression
from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.stages import Stage
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.run import federation as federations
from fedmllm.training.batches import Encoder
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import ClientUpdate, Slots, Weights
from loopback import loopback
from scripted import unscored
from tiny_families import folder_of
from user_transforms import Clipped


def trained(name: str, trial: Trial, folder: Path, *transforms: UpdateTransform, rounds: int = 2) -> tuple[ServerState, Loop]:
    method, training = build_algorithm(AlgorithmConfig(name=name)), TrainingConfig(learning_rate=1e-3)
    engine = InProcessEngine(trial.vlm, trial.encoder, training)
    loop = Loop(method, engine, training, unscored(), RunStore(folder), 0, transforms, FailureConfig(norm_limit=None))
    start = method.init(trial.start, frozen_weights(trial.vlm))
    return run_stage(loop, Stage("federated", trial.clients, rounds, 5), start), loop


def all_weights(state: ServerState) -> Weights:
    """The weights, and what was merged into the frozen weights."""
    return {**state.weights, **state.base}


@dataclass(frozen=True)
class Trial:
    vlm: VisionLanguageModel
    encoder: Encoder
    clients: dict[str, list[Any]]
    start: Weights


@pytest.fixture
def trial(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> Trial:
    samples = itertools.cycle(itertools.chain.from_iterable(federation.clients.values()))
    return Trial(vlm, encoder, {f"c{k}": list(itertools.islice(samples, 1)) for k in range(5)}, read_weights(vlm.model))


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_method_trains_with_a_users_transform_and_compression(name: str, trial: Trial, tmp_path: Path) -> None:
    """A bound that is never reached gives plain training, bit for bit; a low bound does not. Both transforms keep their state."""

    @dataclass(frozen=True)
    class Bound(Clipped):
        def aggregate(self, aggregate: Aggregate, state: ServerState) -> Aggregate:
            return aggregate

    plain, _ = trained(name, trial, tmp_path / "plain")
    far, _ = trained(name, trial, tmp_path / "far", Bound(1e9))
    assert all(torch.equal(all_weights(far)[key], tensor) for key, tensor in all_weights(plain).items())
    near, loop = trained(name, trial, tmp_path / "near", Bound(1e-4), *compression(CompressionConfig(name="int4")))
    records = loop.store.records("federated")
    assert not any(record["refused"] for record in records)
    assert not all(torch.equal(all_weights(near)[key], tensor) for key, tensor in all_weights(plain).items())
    kept = loop.store.client_states("federated").load("c0", near.accepted["c0"])
    assert {"clipped.rest", "compression.update"} <= kept.keys()


@dataclass(frozen=True)
class Halved(UpdateTransform):
    """Halves the update; the client counts how often it sent one."""

    name = "halved"

    def client(self, update: ClientUpdate, context: ClientContext) -> tuple[ClientUpdate, Slots]:
        count = context.kept.get("count", {"n": torch.zeros(1)})["n"] + 1
        return replace(update, update={name: tensor / 2 for name, tensor in update.update.items()}), {"count": {"n": count}}


@dataclass(frozen=True)
class Halving(Strategy):
    """A strategy that supplies a transform."""

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        return (Halved(),)


def test_a_strategys_transform_applies_in_every_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results in one process and over messages are equal bit for bit, and so is what clients keep."""
    monkeypatch.setitem(STRATEGIES, "halving", Halving)
    monkeypatch.setattr(federations, "simulation", partial(loopback))
    monkeypatch.setattr(federations, "require_flower", lambda *modules: None)
    ends = {}
    for engine, strategies in (("in_process", ["halving"]), ("flower", ["halving"]), ("in_process", [])):
        values: dict[str, Any] = {
            "model": {"name": folder_of("llava")},
            "data": {"dataset": "digits-claims", "num_train": 30, "num_test": 8, "check_images": False},
            "federation": {"num_clients": 3, "clients_per_round": 3, "num_rounds": 2, "partition": "iid", "min_partition_size": 3},
            "algorithm": {"name": "fedavg", "strategies": strategies},
            "training": {"batch_size": 4, "learning_rate": 3e-3},
            "evaluation": {"every": 0, "baselines": []},
            "engine": {"device": "cpu", "parallel_clients": 1, "name": engine},
        }
        folder = tmp_path / f"{engine}-{len(strategies)}"
        run.train(Experiment.parse(values), folder, report=False)
        store = RunStore(folder)
        state = store.load_state("federated")
        assert state is not None
        kept = store.client_states("federated").load("client-00", state.accepted["client-00"])
        ends[engine, len(strategies)] = state.weights, {name: float(slot["n"]) for name, slot in kept.items()}
    assert ends["in_process", 1][1] == ends["flower", 1][1] == {"halved.count": 2.0}
    assert all(torch.equal(ends["flower", 1][0][key], tensor) for key, tensor in ends["in_process", 1][0].items())
    assert not all(torch.equal(ends["in_process", 0][0][key], tensor) for key, tensor in ends["in_process", 1][0].items())
