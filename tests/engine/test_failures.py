"""One failure policy for every engine: clients that raise, are late, or send impossible updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.algorithms import AlgorithmConfig, ServerState, build_algorithm
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.engine.base import Assignment, Split
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.observer import Observer
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.stages import Stage
from fedmllm.errors import FederationError
from fedmllm.training.settings import TrainingConfig, reach
from fedmllm.types import Answer, ClientFailure, ClientUpdate, Record, Sample
from scripted import Scripted

START = {"w": torch.zeros(2)}
SAMPLE = Sample("s", "?", "a", {"text": "t"})


@dataclass
class Flaky(Scripted):
    """Each client sends its number. The clients in ``fails`` first fail that many times."""

    fails: dict[str, int] = field(default_factory=dict)
    asked: list[list[str]] = field(default_factory=list)

    def answers(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[Answer]:
        self.asked.append(list(clients))
        for name in clients:
            if self.fails.get(name, 0) > 0:
                self.fails[name] -= 1
                yield ClientFailure(name, "RuntimeError: out of memory")
            else:
                yield ClientUpdate(name, {"w": torch.full((2,), 0.01 * int(name[1:]))}, 1, {"loss": 2.0})


def run(folder: Path, engine: Flaky, policy: FailureConfig, rounds: int = 1, waits: list[Record] | None = None) -> ServerState:
    method, training = build_algorithm(AlgorithmConfig()), TrainingConfig(learning_rate=1.0)
    waited = [] if waits is None else waits
    loop = Loop(
        method,
        engine,
        training,
        Split(lambda w, base: {"score": 0.5}),
        RunStore(folder),
        0,
        failures=policy,
        observer=Observer(waiting=waited.append),
    )
    return run_stage(loop, Stage("federated", {f"c{i}": [SAMPLE] for i in range(1, 11)}, rounds, 10), ServerState(START))


def test_the_mean_is_over_received_updates_and_failures_are_named(tmp_path: Path) -> None:
    """Three of ten clients fail in every round."""
    state = run(tmp_path, Flaky({f"c{i}": 99 for i in (1, 2, 3)}), FailureConfig(), rounds=4)
    assert state.weights["w"].tolist() == pytest.approx([4 * 0.01 * np.mean(range(4, 11))] * 2)
    records = RunStore(tmp_path).records("federated")
    assert len(records) == 4
    for record in records:
        assert record["refused"] == [{"client": f"c{i}", "reason": "RuntimeError: out of memory"} for i in (1, 2, 3)]
        assert (record["num_samples"], record["skipped"], record["bytes_down"]) == (7, False, 10 * 8)


def test_too_few_updates_stop_the_run_and_it_resumes_to_the_same_end(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Flaky(), FailureConfig(), rounds=3)
    policy = FailureConfig(min_updates=10)
    run(tmp_path / "cut", Flaky(), policy, rounds=1)
    with pytest.raises(FederationError, match=r"round 2: 9 usable updates, 10 needed:\n  - c4: RuntimeError: out of memory\n"):
        run(tmp_path / "cut", Flaky({"c4": 1}), policy, rounds=3)
    assert [record["round"] for record in RunStore(tmp_path / "cut").records("federated")] == [1]
    assert torch.equal(run(tmp_path / "cut", Flaky(), policy, rounds=3).weights["w"], whole.weights["w"])


def test_a_skipped_round_does_not_change_the_weights(tmp_path: Path) -> None:
    engine = Flaky({f"c{i}": 1 for i in range(1, 11)})
    state = run(tmp_path, engine, FailureConfig(below="skip"), rounds=2)
    assert state.round_num == 2
    assert state.weights["w"].tolist() == pytest.approx([0.055] * 2)
    first, second = RunStore(tmp_path).records("federated")
    assert (first["skipped"], first["num_samples"], first["loss"], len(first["refused"])) == (True, 0, None, 10)
    assert (second["skipped"], second["refused"]) == (False, [])


def test_waiting_asks_only_clients_without_an_update_again(tmp_path: Path) -> None:
    waits: list[Record] = []
    engine = Flaky({"c1": 1, "c2": 2})
    state = run(tmp_path, engine, FailureConfig(below="wait", pause=0, min_updates=10), waits=waits)
    assert engine.asked[1:] == [["c1", "c2"], ["c2"]]
    assert [(record["attempt"], record["clients"]) for record in waits] == [(2, ["c1", "c2"]), (3, ["c2"])]
    assert state.weights["w"].tolist() == pytest.approx([0.055] * 2)
    (record,) = RunStore(tmp_path).records("federated")
    assert record["bytes_down"] == 13 * 8


def test_bytes_down_do_not_count_clients_that_were_not_reached(tmp_path: Path) -> None:
    """Two clients. Bytes count for the client that the weights reached, whatever became of its answer."""
    whole = bytes_down(tmp_path / "both", {})
    assert whole == 2 * bytes_down(tmp_path / "one", {"client-1": "not connected"}, reached=False)
    assert whole == bytes_down(tmp_path / "late", {"client-1": "no answer within the deadline"}, reached=True)


def bytes_down(folder: Path, failing: Mapping[str, str], reached: bool = True) -> int:
    """Bytes sent to clients in a round of FedAvg with two clients, some of which fail."""

    class Some(Scripted):
        def answers(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[Answer]:
            for name in clients:
                if name in failing:
                    yield ClientFailure(name, failing[name], reached=reached)
                else:
                    yield ClientUpdate(name, {n: torch.zeros_like(w) for n, w in assignment.broadcast.weights.items()}, 1, {"steps": 1.0})

    stage = Stage("federated", {"client-0": (), "client-1": ()}, 1, 2)
    loop = Loop(FedAvg(), Some(), TrainingConfig(), Split(lambda weights, base: {"score": 0.0}), RunStore(folder), 0)
    run_stage(loop, stage, ServerState({"a.lora_A.weight": torch.ones(2, 2)}))
    (row,) = RunStore(folder).records("federated")
    return int(row["bytes_down"])


def test_waiting_ends_after_the_allowed_attempts(tmp_path: Path) -> None:
    engine = Flaky({"c1": 99})
    with pytest.raises(FederationError, match="9 usable updates, 10 needed"):
        run(tmp_path, engine, FailureConfig(below="wait", pause=0, min_updates=10, attempts=3))
    assert len(engine.asked) == 3


def test_a_round_needs_the_methods_smallest_cohort(tmp_path: Path) -> None:
    krum = build_algorithm(AlgorithmConfig(name="krum", parameters={"num_byzantine": 1}))
    engine = Flaky({f"c{i}": 99 for i in range(1, 7)})
    loop = Loop(krum, engine, TrainingConfig(learning_rate=1.0), Split(lambda w, base: {"score": 0.5}), RunStore(tmp_path), 0)
    with pytest.raises(FederationError, match=f"4 usable updates, {krum.smallest_cohort} needed"):
        run_stage(loop, Stage("federated", {f"c{i}": [SAMPLE] for i in range(1, 11)}, 1, 10), ServerState(START))


@dataclass
class Sends(Scripted):
    """All clients send the same update."""

    update: ClientUpdate

    def answers(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[Answer]:
        for name in clients:
            yield replace(self.update, client=name)


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (ClientUpdate("", {"w": torch.full((2,), 1e6)}, 1), "the norm of the update is 1.41e+06, the limit is"),
        (ClientUpdate("", {"w": torch.zeros(2)}, 1, round_num=3), "the update answers round 4, expected round 1"),
    ],
)
def test_impossible_and_stale_updates_are_refused(tmp_path: Path, update: ClientUpdate, reason: str) -> None:
    loop = Loop(
        build_algorithm(AlgorithmConfig()), Sends(update), TrainingConfig(), Split(lambda w, base: {"score": 0.5}), RunStore(tmp_path), 0
    )
    with pytest.raises(FederationError) as caught:
        run_stage(loop, Stage("federated", {"a": [SAMPLE]}, 1, 1), ServerState(START))
    assert reason in str(caught.value)
    unlimited = replace(loop, failures=FailureConfig(norm_limit=None), store=RunStore(tmp_path / "b"))
    if "norm" in reason:
        assert run_stage(unlimited, Stage("federated", {"a": [SAMPLE]}, 1, 1), ServerState(START)).round_num == 1


def test_controls_larger_than_a_gradient_are_refused(tmp_path: Path) -> None:
    """The root mean square is 10.1, then 9.9; the limit is 10."""
    scaffold = build_algorithm(AlgorithmConfig(name="scaffold"))
    start = scaffold.init(START, {})
    for size, accepted in ((10.1, False), (9.9, True)):
        update = ClientUpdate("", {"w": torch.zeros(2)}, 1, extras={"control": {"w": torch.full((2,), size)}})
        loop = Loop(scaffold, Sends(update), TrainingConfig(), Split(lambda w, base: {"score": 0.5}), RunStore(tmp_path / str(size)), 0)
        stage = Stage("federated", {"a": [SAMPLE]}, 1, 1)
        if accepted:
            assert run_stage(loop, stage, start).slots["control"]["w"].tolist() == pytest.approx([9.9, 9.9])
        else:
            with pytest.raises(FederationError, match=r"the norm of the control is 14\.3, the limit is 14\.1"):
                run_stage(loop, stage, start)


def test_a_second_update_of_a_client_does_not_count(tmp_path: Path) -> None:
    class Twice(Scripted):
        def answers(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[Answer]:
            for size in (0.1, 0.2):
                yield ClientUpdate("a", {"w": torch.full((2,), size)}, 1)

    loop = Loop(
        build_algorithm(AlgorithmConfig()),
        Twice(),
        TrainingConfig(learning_rate=1.0),
        Split(lambda w, base: {"score": 0.5}),
        RunStore(tmp_path),
        0,
    )
    state = run_stage(loop, Stage("federated", {"a": [SAMPLE]}, 1, 1), ServerState(START))
    assert state.weights["w"].tolist() == pytest.approx([0.1] * 2)
    assert RunStore(tmp_path).records("federated")[0]["refused"] == [
        {"client": "a", "reason": "the client already sent an update in this round"}
    ]


@settings(max_examples=60)
@given(st.integers(1, 40), st.floats(0, 0.97), st.floats(0.5, 0.999), st.integers(0, 2**31))
def test_adamw_never_moves_further_than_its_reach(steps: int, beta1: float, beta2: float, seed: int) -> None:
    """Gradients of all sizes and signs. The worst ones decay as in the Cauchy-Schwarz bound."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([1.0, 1e-3, 1e3], size=(steps, 3)) * rng.normal(size=(steps, 3))
    sizes[:, 2] = (beta1 / beta2) ** np.arange(steps, 0, -1)
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, betas=(beta1, beta2), eps=1e-30, weight_decay=0.0)
    for gradient in torch.tensor(sizes):
        parameter.grad = gradient
        optimizer.step()
    limit = reach(TrainingConfig(batch_size=1, beta1=beta1, beta2=beta2), 0.01, steps, 3)
    assert float(parameter.detach().norm()) <= limit * (1 + 1e-9)


def test_the_reach_has_a_closed_form_for_any_number_of_steps() -> None:
    training = TrainingConfig(batch_size=1)
    assert reach(training, 0.01, 1, 1) == pytest.approx(0.01)
    assert reach(training, 0.01, 10**15, 1) == pytest.approx(0.01 * 10**15 * np.sqrt(0.2 / (1 - 0.81 / 0.95)), rel=1e-3)
    assert reach(TrainingConfig(batch_size=1, beta2=0.5), 0.01, 10**15, 1) == float("inf")
    assert reach(training, 0.01, 0, 1) == 0
