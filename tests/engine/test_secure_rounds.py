"""Rounds with secure aggregation: the server learns the sum, it names clients that leave, and no client masks twice for a round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmllm.algorithms import ServerState
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.engine.base import Assignment, SecureStage
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.secure import FACTS
from fedmllm.engine.stages import Stage
from fedmllm.errors import FederationError
from fedmllm.privacy.client_level import WITHHELD, ClientPrivacy
from fedmllm.privacy.ledger import Ledger
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.secagg.encoding import Encoding
from fedmllm.privacy.secagg.messages import STAGES, MaskedVector, Message
from fedmllm.privacy.secagg.quantize import Private, Weighted
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Answer, ClientFailure, ClientUpdate, Sample
from scripted import Clients, Scripted, cut_short, secured, unscored

NAMES = [f"client-{number}" for number in range(5)]
SIZE = 7


@dataclass
class Honest(Scripted):
    """Every client sends a fixed random update. Clients in ``broken`` fail to train."""

    broken: tuple[str, ...] = ()
    asked: list[list[str]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    vectors: list[np.ndarray[Any, Any]] = field(default_factory=list)

    def answers(self, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
        self.asked.append(sorted(clients))
        for name in clients:
            yield ClientFailure(name, "out of memory") if name in self.broken else update(name)

    def carry(self, stage: SecureStage) -> Iterator[tuple[str, Message | ClientFailure]]:
        self.events.append(stage.name)
        for name, answer in super().carry(stage):
            if isinstance(answer, MaskedVector):
                self.vectors.append(answer.vector.copy())
            yield name, answer


def entries(name: str) -> np.ndarray[Any, Any]:
    return np.random.default_rng(NAMES.index(name)).normal(0, 0.3, SIZE).astype(np.float32)


def update(name: str) -> ClientUpdate:
    return ClientUpdate(name, {"w": torch.from_numpy(entries(name))}, 2 + NAMES.index(name), {"loss": 1.0})


def quantized_mean(names: list[str]) -> np.ndarray[Any, Any]:
    """The weighted mean of the clients' updates, whose shares of the whole cohort are rounded to multiples of 4 / 2^30, in Python's integers."""
    samples = {name: 2 + NAMES.index(name) for name in NAMES}
    shares = {name: count / sum(samples.values()) for name, count in samples.items()}
    scale = 2**30 / 4
    rows = [[round(float(value) * (shares[name] * scale)) for value in entries(name).astype(np.float64)] for name in names]
    sums = np.array([sum(column) for column in zip(*rows, strict=True)], np.float64)
    total: np.ndarray[Any, Any] = sums / scale / sum(shares[name] for name in names)
    return total


def begin() -> ServerState:
    return ServerState({"w": torch.zeros(SIZE)})


def stage(rounds: int = 1) -> Stage:
    return Stage("federated", {name: [Sample("s", "?", "a", {"text": "t"})] * 10 for name in NAMES}, rounds, 5)


def secure_loop(folder: Path, engine: Scripted, encoding: Encoding | None = None, **failures: Any) -> Loop:
    secure = secured(engine, folder, NAMES, encoding or Encoding(Weighted(4.0)))
    policy = FailureConfig(**({"below": "skip"} | failures))
    return Loop(FedAvg(), engine, TrainingConfig(learning_rate=1e-3), unscored(), RunStore(folder), 0, failures=policy, secure=secure)


def test_the_result_is_the_quantized_mean_bit_for_bit(tmp_path: Path) -> None:
    engine = Honest()
    state = run_stage(secure_loop(tmp_path, engine), stage(), begin())
    assert np.array_equal(state.weights["w"].numpy(), quantized_mean(NAMES).astype(np.float32))
    (record,) = RunStore(tmp_path).records()
    assert engine.events == list(STAGES)
    assert record["num_samples"] == sum(range(2, 7))
    assert record[FACTS]["clients"] == 5
    assert record["bytes_up"] > 5 * 4 * SIZE
    assert not record["skipped"]


def test_the_server_sees_neither_updates_nor_their_integers(tmp_path: Path) -> None:
    engine = Honest()
    run_stage(secure_loop(tmp_path, engine), stage(), begin())
    sent = {tuple(vector.tolist()) for vector in engine.vectors}
    assert len(sent) == 5
    # A masked vector is uniform: integers of an update are below 2^30 / 4 in absolute value.
    assert all(np.abs(vector.view(np.int32).astype(np.int64)).max() > 2**28 for vector in engine.vectors)


@pytest.mark.parametrize("where", STAGES)
def test_one_of_five_clients_may_leave_in_any_stage(where: str, tmp_path: Path) -> None:
    """A client that leaves before its vector arrives is refused and named. A client that leaves later is in the sum."""
    engine = Honest()
    engine.gone = {where: ["client-2"]}
    state = run_stage(secure_loop(tmp_path, engine), stage(), begin())
    (record,) = RunStore(tmp_path).records()
    in_sum = STAGES.index(where) > STAGES.index("masked")
    names = NAMES if in_sum else [name for name in NAMES if name != "client-2"]
    assert np.array_equal(state.weights["w"].numpy(), quantized_mean(names).astype(np.float32))
    assert record["refused"] == ([] if in_sum else [{"client": "client-2", "reason": f"left secure aggregation in stage {where}: gone"}])
    assert record[FACTS]["left_later"] == (["client-2"] if in_sum else [])
    assert sorted(state.accepted) == names
    assert sorted(record["losses"]) == names


@pytest.mark.parametrize("where", STAGES)
def test_a_session_with_too_few_clients_is_a_skipped_round_and_says_why(where: str, tmp_path: Path) -> None:
    """Of five clients at least four must stay. Three rounds: all are skipped, although ``failures.below`` is ``wait``."""
    engine = Honest()
    engine.gone = {where: ["client-2", "client-4"]}
    least = {"keys": 4}.get(where)
    loop = secure_loop(tmp_path, engine, below="wait", pause=0, **({"min_updates": least} if least else {}))
    state = run_stage(loop, stage(3), begin())
    assert torch.equal(state.weights["w"], torch.zeros(SIZE))
    assert state.accepted == {}
    records = RunStore(tmp_path).records()
    assert [record["skipped"] for record in records] == [True] * 3
    assert all(f"at least 4 clients after stage {where}, but 3 are left" in record[FACTS]["failed"] for record in records)
    assert all({row["client"] for row in record["refused"]} == {"client-2", "client-4"} for record in records)
    assert all(record["loss"] is None and record["num_samples"] == 0 for record in records)
    assert len(engine.asked) == 3  # no retries


def test_clients_that_fail_to_train_are_retried_before_the_session(tmp_path: Path) -> None:
    @dataclass
    class Slow(Honest):
        def answers(self, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
            yield from super().answers(assignment, clients)
            self.broken = ()

    engine = Slow(broken=("client-1", "client-3", "client-4"))
    state = run_stage(secure_loop(tmp_path, engine, below="wait", pause=0), stage(), begin())
    assert engine.asked == [NAMES, ["client-1", "client-3", "client-4"]]
    assert np.array_equal(state.weights["w"].numpy(), quantized_mean(NAMES).astype(np.float32))


def test_too_few_trained_clients_follow_the_failure_policy(tmp_path: Path) -> None:
    engine = Honest(broken=tuple(NAMES[:3]))
    with pytest.raises(FederationError, match="2 usable updates, 3 needed"):
        run_stage(secure_loop(tmp_path, engine, below="stop"), stage(), begin())
    assert engine.events == []


@pytest.mark.parametrize("crash", ["masked", "survivors", "unmask"])
def test_a_round_that_was_masked_before_a_crash_is_skipped(crash: str, tmp_path: Path) -> None:
    """The resumed run does not train for it again, and every client masks one vector for each round."""

    @dataclass
    class Crashing(Honest):
        def carry(self, stage: SecureStage) -> Iterator[tuple[str, Message | ClientFailure]]:
            yield from super().carry(stage)
            if stage.name == crash and stage.round_id.round_num == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(secure_loop(tmp_path, Crashing()), stage(3), begin())
    engine = Honest()
    run_stage(secure_loop(tmp_path, engine), stage(3), begin())
    records = RunStore(tmp_path).records()
    assert [record["skipped"] for record in records] == [False, True, False]
    assert "a second vector would let the server take the difference" in records[1][FACTS]["failed"]
    assert engine.asked == [NAMES]
    for name in NAMES:
        rounds = [json.loads(line)["round"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert rounds == [0, 1, 2]


def test_a_crash_before_the_checkpoint_does_not_repeat_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with cut_short(monkeypatch, after=1):
        run_stage(secure_loop(tmp_path, Honest()), stage(3), begin())
    run_stage(secure_loop(tmp_path, Honest()), stage(3), begin())
    assert [record["skipped"] for record in RunStore(tmp_path).records()] == [False, True, False]


def test_a_crash_before_masking_repeats_the_round(tmp_path: Path) -> None:
    @dataclass
    class Crashing(Honest):
        def carry(self, stage: SecureStage) -> Iterator[tuple[str, Message | ClientFailure]]:
            yield from super().carry(stage)
            if stage.name == "shares":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(secure_loop(tmp_path, Crashing()), stage(), begin())
    state = run_stage(secure_loop(tmp_path, Honest()), stage(), begin())
    assert np.array_equal(state.weights["w"].numpy(), quantized_mean(NAMES).astype(np.float32))


def test_an_update_in_the_clear_is_refused(tmp_path: Path) -> None:
    @dataclass
    class Open(Honest):
        def completed(self, order: Any = None) -> Iterator[Answer]:
            for answer in super().completed(order):
                yield update(answer.client) if answer.client == "client-1" else answer

    state = run_stage(secure_loop(tmp_path, Open()), stage(), begin())
    (record,) = RunStore(tmp_path).records()
    assert record["refused"] == [{"client": "client-1", "reason": "the client sent its update in the clear"}]
    assert "client-1" not in state.accepted


def test_a_held_update_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    @dataclass
    class Holding(Honest):
        def answers(self, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
            for answer in super().answers(assignment, clients):
                yield replace(answer, update={}, held=True) if isinstance(answer, ClientUpdate) else answer

    loop = Loop(FedAvg(), Holding(), TrainingConfig(), unscored(), RunStore(tmp_path), 0, failures=FailureConfig(below="skip"))
    run_stage(loop, stage(), begin())
    (record,) = RunStore(tmp_path).records()
    assert record["skipped"]
    assert "holds its update back, which nobody asked for" in record["refused"][0]["reason"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 4.1])
def test_a_client_with_an_entry_out_of_range_fails_before_the_session(value: float, tmp_path: Path) -> None:
    @dataclass
    class Wild(Honest):
        def answers(self, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
            for name in clients:
                found = update(name)
                if name == "client-0":
                    found.update["w"][3] = value
                yield found

    run_stage(secure_loop(tmp_path, Wild()), stage(), begin())
    (record,) = RunStore(tmp_path).records()
    assert [row["client"] for row in record["refused"]] == ["client-0"]
    assert "entries of an update must be numbers of at most 4" in record["refused"][0]["reason"]
    assert record[FACTS]["clients"] == 4


def test_a_client_that_dominates_the_sum_stops_the_session(tmp_path: Path) -> None:
    @dataclass
    class Heavy(Honest):
        def answers(self, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
            for name in clients:
                yield replace(update(name), num_samples=10 if name == "client-0" else 1)

    light = replace(stage(), clients={n: [Sample("s", "?", "a", {})] * 100 for n in NAMES})
    loop = secure_loop(tmp_path, Heavy())
    run_stage(loop, light, begin())
    assert not RunStore(tmp_path).records()[0]["skipped"]  # 10 of 14 is below 0.8

    class Heavier(Heavy):
        def answers(self, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
            for name in clients:
                yield replace(update(name), num_samples=17 if name == "client-0" else 1)

    (tmp_path / "other").mkdir()
    run_stage(secure_loop(tmp_path / "other", Heavier()), light, begin())
    (record,) = RunStore(tmp_path / "other").records()
    assert record["skipped"]
    assert "client-0 has 0.809524, which would show its update" in record["refused"][0]["reason"]


# Client-level privacy.


class Watched(Ledger):
    """A ledger that also notes in the engine's events when it is written."""

    events: list[str]

    def spend(self, *args: Any, **about: Any) -> None:
        super().spend(*args, **about)
        self.events.append("ledger")


def private_loop(folder: Path, engine: Honest, at_clients: bool = True, z: float = 0.5) -> Loop:
    ledger = Watched(folder / "privacy.jsonl")
    ledger.events = engine.events
    privacy = ClientPrivacy(1.0, z, 5, Noise(), ledger, noise_at_clients=at_clients)
    return replace(secure_loop(folder, engine, Encoding(Private(1.0, z, 5, 3), at_clients)), privacy=privacy)


def clipped_mean(names: list[str]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = np.zeros(SIZE)
    for name in names:
        vector = entries(name).astype(np.float64)
        found += vector * min(1.0, 1 / np.linalg.norm(vector))
    return found / 5


@pytest.mark.parametrize("at_clients", [True, False])
def test_a_private_sum_is_in_the_ledger_before_it_can_be_unmasked(at_clients: bool, tmp_path: Path) -> None:
    engine = Honest()
    engine.gone = {"masked": ["client-2"]}
    state = run_stage(private_loop(tmp_path, engine, at_clients, z=1e-4), stage(), begin())
    assert engine.events == [*STAGES[:-1], "ledger", "unmask"]
    left = [name for name in NAMES if name != "client-2"]
    assert [line["clients"] for line in Ledger(tmp_path / "privacy.jsonl").lines()] == [left]
    # Divided by the fixed size of the cohort, not by the four clients in the sum.
    assert np.allclose(state.weights["w"].numpy(), clipped_mean(left), atol=1e-3)
    (record,) = RunStore(tmp_path).records()
    assert record["refused"] == [{"client": "client-2", "reason": WITHHELD}]


def test_a_private_session_that_fails_before_unmasking_costs_nothing(tmp_path: Path) -> None:
    engine = Honest()
    engine.gone = {"masked": ["client-2", "client-4"]}
    run_stage(private_loop(tmp_path, engine), stage(), begin())
    assert Ledger(tmp_path / "privacy.jsonl").lines() == []
    assert RunStore(tmp_path).records()[0]["skipped"]


@pytest.mark.parametrize(("at_clients", "gone", "variance"), [(True, 0, 5 / 3), (True, 1, 4 / 3), (False, 0, 1.0), (False, 1, 1.0)])
def test_the_noise_of_a_sum_has_the_variance_that_the_ledger_counts(at_clients: bool, gone: int, variance: float, tmp_path: Path) -> None:
    """Each of n clients adds (z C)^2 / 3, so that any three have (z C)^2; the server adds (z C)^2, however many are left."""

    class Zero(Honest):
        def answers(self, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
            for name in clients:
                yield ClientUpdate(name, {"w": torch.zeros(40_000)}, 1)

    engine = Zero()
    engine.gone = {"masked": NAMES[:gone]}
    state = run_stage(private_loop(tmp_path, engine, at_clients), stage(), ServerState({"w": torch.zeros(40_000)}))
    noise = state.weights["w"].double() * 5 / 0.5
    assert float(noise.var()) == pytest.approx(variance, rel=0.035)  # five standard errors, sqrt(2 / 40,000)


def test_a_client_that_adds_noise_reports_nothing_else_about_its_data(tmp_path: Path) -> None:
    seen: list[Answer] = []

    class Seen(Honest):
        def completed(self, order: Any = None) -> Iterator[Answer]:
            for answer in super().completed(order):
                seen.append(answer)
                yield answer

    run_stage(private_loop(tmp_path, Seen()), stage(), begin())
    assert [(a.num_samples, a.metrics, dict(a.profile)) for a in seen if isinstance(a, ClientUpdate)] == [(None, {}, {})] * 5
