from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmllm.algorithms import AlgorithmConfig, ServerState, build_algorithm
from fedmllm.data.federated import FederatedData
from fedmllm.engine.base import Assignment, Split
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.intake import refusal
from fedmllm.engine.observer import UNOBSERVED, Observer
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.scores import evaluate_state
from fedmllm.engine.stages import Stage
from fedmllm.errors import FederationError
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights
from fedmllm.training.batches import Encoder
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import ClientUpdate, Metrics, Record, Sample, Weights
from scripted import Scripted, answers

START = {"w": torch.zeros(2)}


@dataclass
class Numbers(Scripted):
    """Each client sends its number, unless ``script`` has another update for it."""

    script: Mapping[str, ClientUpdate] = field(default_factory=dict)

    def answers(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[ClientUpdate]:
        for name in clients:
            default = ClientUpdate(name, {"w": torch.full((2,), float(name[-1]))}, 1, {"loss": 2.0})
            yield self.script.get(name, default)


def score(weights: Weights, base: Weights) -> Metrics:
    return {"score": float(weights["w"].mean())}


def loop(folder: Path, engine: Numbers | None = None, seen: list[Record] | None = None) -> Loop:
    return Loop(
        build_algorithm(AlgorithmConfig()),
        engine or Numbers(),
        TrainingConfig(learning_rate=1.0),  # large enough for updates of the size of a client's number
        Split(score),
        RunStore(folder),
        0,
        observer=UNOBSERVED if seen is None else Observer(round_done=seen.append),
    )


def stage(num_clients: int = 4, cohort: int = 4, rounds: int = 1, every: int = 0) -> Stage:
    return Stage("federated", {f"c{i}": [] for i in range(num_clients)}, rounds, cohort, every)


def test_records_describe_each_round(tmp_path: Path) -> None:
    seen: list[Record] = []
    watched = replace(loop(tmp_path, seen=seen), validation=Split(lambda weights, base: {"score": -float(weights["w"].mean())}))
    state = run_stage(watched, stage(4, 2, rounds=3, every=2), ServerState(START))
    assert [record["round"] for record in seen] == [1, 2, 3]
    assert [record["score"] is not None for record in seen] == [False, False, True]
    assert [record["validation"] is not None for record in seen] == [False, True, True]
    assert seen[-1]["validation"]["score"] == -seen[-1]["score"]
    assert seen[-1]["score"] == pytest.approx(float(state.weights["w"].mean()))
    assert all(record["bytes_up"] == record["bytes_down"] == 2 * 8 for record in seen)
    assert all(record["loss"] == 2.0 and record["num_samples"] == 2 for record in seen)
    stored = RunStore(tmp_path).records("federated")
    assert [{k: v for k, v in record.items() if k != "num_rounds"} for record in seen] == stored


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (ClientUpdate("c0", {"w": torch.tensor([1.0, float("nan")])}, 1), "NaN or infinity"),
        (ClientUpdate("c0", {"w": torch.tensor([1.0, float("inf")])}, 1), "NaN or infinity"),
        (ClientUpdate("c0", {"w": torch.zeros(3)}, 1), "shape (3,), expected (2,)"),
        (ClientUpdate("c0", {"v": torch.zeros(2)}, 1), "tensors are missing, e.g. w"),
        (ClientUpdate("c0", {"w": torch.zeros(2), "v": torch.zeros(2)}, 1), "tensors are unknown, e.g. v"),
        (ClientUpdate("c0", {"w": torch.zeros(2)}, 0), "num_samples is 0"),
    ],
)
def test_a_bad_update_is_refused_named_and_left_out_of_the_mean(tmp_path: Path, bad: ClientUpdate, reason: str) -> None:
    state = run_stage(loop(tmp_path, Numbers({"c0": bad})), stage(3, 3), ServerState(START))
    assert state.weights["w"].tolist() == [1.5, 1.5]
    (record,) = RunStore(tmp_path).records("federated")
    assert [row["client"] for row in record["refused"]] == ["c0"]
    assert reason in record["refused"][0]["reason"]
    assert record["num_samples"] == 2


def test_a_round_without_usable_updates_stops_and_leaves_no_trace(tmp_path: Path) -> None:
    bad = {f"c{i}": ClientUpdate(f"c{i}", {"w": torch.full((2,), float("nan"))}, 1) for i in range(2)}
    with pytest.raises(FederationError, match="round 1: no usable update") as caught:
        run_stage(loop(tmp_path, Numbers(bad)), stage(2, 2), ServerState(START))
    assert "c0: the update contains NaN" in str(caught.value)
    assert RunStore(tmp_path).records("federated") == []


def test_a_good_update_is_not_refused() -> None:
    assert refusal(ClientUpdate("c0", {"w": torch.ones(2)}, 1), START) is None


def test_fedavg_of_real_clients_equals_numpy(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData, tmp_path: Path) -> None:
    """Two rounds of real training. NumPy recomputes the averages from each client's own weights."""
    training = TrainingConfig(batch_size=8)
    engine = InProcessEngine(vlm, encoder, training)
    calls: list[tuple[Weights, list[ClientUpdate]]] = []

    class Spy(Scripted):
        def answers(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[ClientUpdate]:
            found = list(answers(engine, assignment, clients))
            calls.append((assignment.broadcast.weights, found))
            return iter(found)

    spied = Loop(build_algorithm(AlgorithmConfig()), Spy(), training, Split(lambda w, base: {"score": 0.0}), RunStore(tmp_path), 0)
    first = read_weights(vlm.model)
    end = run_stage(spied, Stage("federated", federation.clients, 2, 2), ServerState(first))
    assert len(calls) == 2
    for (before, found), after in zip(calls, [calls[1][0], end.weights], strict=True):
        counts = np.array([update.num_samples for update in found])
        assert counts.tolist() == [len(federation.clients[update.client]) for update in found]
        for name in before:
            local = [before[name].double().numpy() + update.update[name].double().numpy() for update in found]
            expected = np.tensordot(counts / counts.sum(), np.array(local), axes=1)
            np.testing.assert_allclose(after[name].numpy(), expected, atol=1e-6, rtol=0)


def test_zero_local_steps_leave_the_global_weights(
    vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData, tmp_path: Path
) -> None:
    training = TrainingConfig(local_epochs=0)
    idle = Loop(
        build_algorithm(AlgorithmConfig()),
        InProcessEngine(vlm, encoder, training),
        training,
        Split(lambda w, base: {"score": 0.0}),
        RunStore(tmp_path),
        0,
    )
    first = read_weights(vlm.model)
    end = run_stage(idle, Stage("federated", federation.clients, 2, 2), ServerState(first))
    assert all(torch.equal(end.weights[name], first[name]) for name in first)


def test_resume_in_the_middle_repeats_nothing_and_skips_nothing(tmp_path: Path) -> None:
    whole = run_stage(loop(tmp_path / "whole"), stage(4, 2, rounds=6), ServerState(START))
    run_stage(loop(tmp_path / "parts"), stage(4, 2, rounds=3), ServerState(START))
    store = RunStore(tmp_path / "parts")
    store.append({"stage": "federated", "round": 4, "note": "its checkpoint was never written"})
    resumed = run_stage(loop(tmp_path / "parts"), stage(4, 2, rounds=6), ServerState(START))
    assert torch.equal(whole.weights["w"], resumed.weights["w"])
    rounds = [record["clients"] for record in store.records("federated")]
    assert rounds == [record["clients"] for record in RunStore(tmp_path / "whole").records("federated")]


def test_a_personalized_method_is_scored_by_the_mean_over_client_models(tmp_path: Path) -> None:
    def scored(weights: Weights, base: Weights) -> Metrics:
        return {"score": float(weights["w"].mean()), "standard_error": 0.5, "num_samples": 8, "failures": 1}

    own = replace(loop(tmp_path), algorithm=build_algorithm(AlgorithmConfig(name="ditto")), test=Split(scored))
    for client, value in (("c0", 0.25), ("c1", 0.75)):
        own.store.client_states("federated").save(client, 0, {"personal": {"w": torch.full((2,), value)}}, [])
    # 0.25, 0.75, and the global 0.5 for a client that never took part: standard deviation 0.25.
    state = ServerState({"w": torch.full((2,), 0.5)}, round_num=1, accepted={"c0": [0], "c1": [0]})
    several = evaluate_state(own, stage(3), state)
    assert several == {"score": 0.5, "standard_error": pytest.approx(0.25 / 3**0.5), "num_samples": 24, "failures": 3}
    # A single client has no error over clients, so its error over test samples stays.
    alone = evaluate_state(own, stage(1), state)
    assert alone == {"score": 0.25, "standard_error": 0.5, "num_samples": 8, "failures": 1}
