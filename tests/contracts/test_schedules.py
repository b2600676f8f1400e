"""The guarantees of schedules: compared with an independent simulation, with each other, and with every method that they support."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmllm import api as run
from fedmllm.algorithms import ALGORITHMS, AlgorithmConfig, ServerState, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.engine import schedules as package
from fedmllm.engine.base import Assignment
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.observer import Observer
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.schedules import SCHEDULES, SYNCHRONOUS, Schedule, SchedulingConfig, build_schedule
from fedmllm.engine.schedules.buffered import Buffered
from fedmllm.engine.stages import Stage, drawn
from fedmllm.errors import ConfigError, FederationError
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.run import federation as federations
from fedmllm.training.batches import Encoder
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Answer, ClientFailure, ClientUpdate, Record, Sample
from loopback import loopback
from scripted import Scripted, cut_short, unscored
from tiny_families import folder_of

SAMPLE = Sample("s", "?", "a", {"text": "t"})
START = {"w": torch.zeros(2)}
# The more samples a client has, the later it answers.
SIZES = {f"c{i}": 1 + (5 * i) % 7 for i in range(8)}


@dataclass
class Pulled(Scripted):
    """Each client moves a tenth of the way to its number. The clients in ``fails`` first fail that many times."""

    fails: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)

    def answers(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[Answer]:
        for name, samples in clients.items():
            self.asked.append((name, assignment.broadcast.round_num))
            if self.fails.get(name, 0) > 0:
                self.fails[name] -= 1
                yield ClientFailure(name, "RuntimeError: broken")
            else:
                update = {"w": 0.1 * (int(name[1:]) - assignment.broadcast.weights["w"])}
                yield ClientUpdate(name, update, len(samples), {"loss": 1.0}, round_num=assignment.broadcast.round_num)


def pulled(
    folder: Path,
    schedule: Schedule,
    rounds: int,
    engine: Pulled | None = None,
    policy: FailureConfig | None = None,
    waits: list[Record] | None = None,
    cohort: int = 4,
) -> tuple[ServerState, list[Record], Pulled]:
    chosen, seen = engine or Pulled(), Observer(waiting=(waits if waits is not None else []).append)
    loop = Loop(build_algorithm(AlgorithmConfig()), chosen, TrainingConfig(learning_rate=1.0), unscored(), RunStore(folder), 3)
    loop = replace(loop, schedule=schedule, failures=policy or FailureConfig(), observer=seen)
    stage = Stage("federated", {name: [SAMPLE] * size for name, size in SIZES.items()}, rounds, cohort)
    state = run_stage(loop, stage, ServerState(START))
    return state, RunStore(folder).records("federated"), chosen


def fedbuff(rounds: int, concurrency: int, buffer: int, staleness: float, seed: int = 3) -> tuple[float, list[dict[str, int]]]:
    """The same rule on one number, simulated with a heap of events, and the staleness of each round's updates."""
    w, clock, at_work, history = 0.0, 0.0, list[tuple[float, int, str, int, float]](), list[dict[str, int]]()
    number = itertools.count()
    for step in range(rounds):
        free = sorted(set(SIZES) - {name for _, _, name, _, _ in at_work})
        for name in drawn(free, concurrency - len(at_work), seed, step):
            heapq.heappush(at_work, (clock + SIZES[name], next(number), name, step, w))
        total, weight, stale = 0.0, 0, dict[str, int]()
        for _ in range(buffer):
            clock, _, name, begun, sent = heapq.heappop(at_work)
            stale[name] = step - begun
            total += SIZES[name] * (1 + step - begun) ** -staleness * 0.1 * (int(name[1:]) - sent)
            weight += SIZES[name]
        w += total / weight
        history.append(stale)
    return w, history


@pytest.mark.parametrize(("concurrency", "buffer", "staleness"), [(5, 2, 0.5), (6, 1, 0.0), (8, 3, 2.0), (3, 3, 0.5)])
def test_buffered_equals_a_simulation_of_fedbuff(tmp_path: Path, concurrency: int, buffer: int, staleness: float) -> None:
    expected, history = fedbuff(12, concurrency, buffer, staleness)
    state, records, _ = pulled(tmp_path, Buffered(concurrency, buffer, staleness), 12)
    assert state.weights["w"].tolist() == pytest.approx([expected] * 2, rel=1e-5)
    assert [record["staleness"] for record in records] == history
    assert any(any(stale.values()) for stale in history) == (buffer < concurrency)
    assert all(len(record["clients"]) == buffer and record["bytes_down"] == buffer * 8 for record in records)


def test_staleness_reduces_an_update_unless_the_exponent_is_zero(tmp_path: Path) -> None:
    """With exponent 0 every step goes a tenth of the way. With exponent 1 an update that is one step late counts half."""
    whole = fedbuff(6, 6, 1, 0.0)[0]
    damped = fedbuff(6, 6, 1, 1.0)[0]
    assert pulled(tmp_path / "a", Buffered(6, 1, 0.0), 6)[0].weights["w"][0] == pytest.approx(whole, rel=1e-5)
    assert pulled(tmp_path / "b", Buffered(6, 1, 1.0), 6)[0].weights["w"][0] == pytest.approx(damped, rel=1e-5)
    assert damped < 0.8 * whole


def test_a_buffer_as_large_as_the_concurrency_is_the_synchronous_schedule(tmp_path: Path) -> None:
    """For any client sizes. The order of sums differs, so the last bit may differ."""
    first, rounds, _ = pulled(tmp_path / "synchronous", SYNCHRONOUS, 6)
    second, steps, _ = pulled(tmp_path / "buffered", Buffered(), 6)
    torch.testing.assert_close(second.weights["w"], first.weights["w"], rtol=1e-6, atol=0)
    assert [record["clients"] for record in steps] == [record["clients"] for record in rounds]
    assert not any(any(record["staleness"].values()) for record in steps)


@pytest.mark.parametrize("cut", range(1, 8))
def test_an_interrupted_run_ends_bit_for_bit_the_same(tmp_path: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that were at work train again from the weights that they had received."""
    schedule = Buffered(6, 2, 0.5)
    whole, rounds, _ = pulled(tmp_path / "whole", schedule, 8)
    with cut_short(monkeypatch, cut):
        pulled(tmp_path / "parts", schedule, 8)
    parts, again, engine = pulled(tmp_path / "parts", schedule, 8)
    assert {round_num for _, round_num in engine.asked if round_num < cut} or cut == 1
    assert torch.equal(parts.weights["w"], whole.weights["w"])
    without = [{key: value for key, value in record.items() if key != "seconds"} for record in again]
    assert without == [{key: value for key, value in record.items() if key != "seconds"} for record in rounds]
    assert parts.outstanding.clients == whole.outstanding.clients


def test_a_failed_client_is_replaced_and_named(tmp_path: Path) -> None:
    _, records, _ = pulled(tmp_path, Buffered(4, 4), 1, Pulled({"c0": 9, "c5": 9, "c2": 9}))
    (record,) = records
    assert len(record["staleness"]) == 4
    refused = {row["client"] for row in record["refused"]}
    assert refused <= {"c0", "c5", "c2"}
    assert set(record["clients"]) == refused | set(record["staleness"])


def test_too_few_updates_stop_skip_or_wait(tmp_path: Path) -> None:
    """Every client fails its first time."""
    broken = dict.fromkeys(SIZES, 1)
    with pytest.raises(FederationError, match="no usable update"):
        pulled(tmp_path / "stop", Buffered(4, 2), 2, Pulled(dict(broken)), FailureConfig(min_updates=2))
    state, records, _ = pulled(tmp_path / "skip", Buffered(4, 2), 2, Pulled(dict(broken)), FailureConfig(min_updates=2, below="skip"))
    assert [record["skipped"] for record in records] == [True, False]
    assert state.round_num == 2
    waits: list[Record] = []
    policy = FailureConfig(min_updates=2, below="wait", pause=0)
    _, records, _ = pulled(tmp_path / "wait", Buffered(4, 2), 1, Pulled(dict(broken)), policy, waits)
    assert len(records[0]["staleness"]) == 2
    assert [record["attempt"] for record in waits] == [2]


def test_retries_of_a_broken_federation_are_limited(tmp_path: Path) -> None:
    engine = Pulled(dict.fromkeys(SIZES, 10**6))
    with pytest.raises(FederationError, match="no usable update"):
        pulled(tmp_path, Buffered(2, 2), 1, engine, FailureConfig(below="wait", pause=0, attempts=3))
    assert len(engine.asked) <= 3 * (2 + 2)


TAKES = sorted(name for name, cls in ALGORITHMS.items() if cls.takes_stale_updates)


def test_which_methods_take_stale_updates() -> None:
    """The server must add a function of the updates to its weights, and clients must send the same tensors in every round."""
    refused = {"calibrated_flexlora", "fedex_lora", "fedilora", "flexlora", "flora", "hetlora", "rolora", "scaffold", "yoco"}
    assert set(ALGORITHMS) - set(TAKES) == refused


@pytest.mark.parametrize("name", TAKES)
def test_every_method_that_takes_stale_updates_trains_buffered(
    name: str, vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData, tmp_path: Path
) -> None:
    """Four clients at work and a buffer of three. With a buffer of four the run is the synchronous one: all clients are equally fast."""
    method, training = build_algorithm(AlgorithmConfig(name=name)), TrainingConfig(learning_rate=1e-3)
    names = sorted(federation.clients)
    clients = {f"c{i}": list(federation.clients[names[i % len(names)]])[:2] for i in range(6)}
    start, ends = method.init(read_weights(vlm.model), frozen_weights(vlm)), {}
    for kind, schedule in (("synchronous", SYNCHRONOUS), ("full", Buffered(4, 4)), ("buffered", Buffered(4, 3))):
        engine = InProcessEngine(vlm, encoder, training)
        loop = Loop(method, engine, training, unscored(), RunStore(tmp_path / kind), 0, schedule=schedule)
        state = run_stage(loop, Stage("federated", clients, 3, 4), start)
        assert not any(record["refused"] for record in loop.store.records("federated"))
        ends[kind] = state.weights
    assert all(torch.equal(ends["full"][key], tensor) for key, tensor in ends["synchronous"].items())
    assert not all(torch.equal(ends["buffered"][key], tensor) for key, tensor in ends["full"].items())


def settings(engine: str = "in_process", **sections: Any) -> Experiment:
    values: dict[str, Any] = {
        "model": {"name": folder_of("llava")},
        "data": {"dataset": "digits-claims", "num_train": 40, "num_test": 8, "check_images": False},
        "federation": {"num_clients": 6, "clients_per_round": 4, "num_rounds": 4, "partition": "iid", "min_partition_size": 3},
        "schedule": {"name": "buffered", "parameters": {"buffer": 2}},
        "training": {"batch_size": 4, "learning_rate": 3e-3},
        "evaluation": {"every": 0, "baselines": []},
        "engine": {"device": "cpu", "parallel_clients": 4, "name": engine},
    }
    return Experiment.parse(values | sections)


def test_buffered_ends_the_same_in_one_process_and_over_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated clients answer in simulated time, whatever carries their answers."""
    monkeypatch.setattr(federations, "simulation", partial(loopback))
    monkeypatch.setattr(federations, "require_flower", lambda *modules: None)
    found = []
    for engine in ("in_process", "flower"):
        result = run.train(settings(engine, compression={"name": "int8"}), tmp_path / engine, report=False)
        assert result.clients_per_round == 2
        store = RunStore(tmp_path / engine)
        state = store.load_state("federated")
        assert state is not None
        found.append((state, [{k: v for k, v in record.items() if k != "seconds"} for record in store.records("federated")]))
    (here, rounds), (there, waits) = found
    assert all(torch.equal(there.weights[key], tensor) for key, tensor in here.weights.items())
    assert rounds == waits
    assert max(max(record["staleness"].values()) for record in rounds) >= 1
    assert here.outstanding.clients == there.outstanding.clients
    assert len(here.outstanding.clients) == 2


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"algorithm": {"name": "scaffold"}}, "scaffold cannot mix updates that began from different weights; use synchronous"),
        ({"schedule": {"name": "buffered", "parameters": {"concurrency": 7}}}, "concurrency 7 is more than federation.num_clients, 6"),
        ({"schedule": {"name": "buffered", "parameters": {"buffer": 5}}}, "a buffer of 5 never fills with 4 clients at work"),
        ({"schedule": {"name": "buffered", "parameters": {"staleness": -1}}}, "staleness must not be negative"),
        (
            {"schedule": {"name": "buffered", "parameters": {"speed": 1}}},
            "buffered has no parameter 'speed'; it takes concurrency, buffer, staleness",
        ),
        ({"schedule": {"name": "bufered"}}, "'bufered' is not a known schedule; did you mean buffered?"),
        (
            {"algorithm": {"name": "krum"}, "schedule": {"name": "buffered", "parameters": {"buffer": 1}}},
            "krum needs",
        ),
    ],
)
def test_impossible_settings_are_refused_before_training(sections: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**sections)
    assert part in str(caught.value)


def test_every_schedule_has_a_row_and_a_file() -> None:
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert set(SCHEDULES) == files
    assert isinstance(build_schedule(SchedulingConfig()), SCHEDULES["synchronous"])
