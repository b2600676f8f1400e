"""Flower as the engine: faulty answers and lost messages with a Grid in this process, and a real Ray simulation with a killed worker."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmllm import api as run
from fedmllm import weights as W
from fedmllm.config import Experiment
from fedmllm.engine.checkpoint import RunStore
from fedmllm.errors import ConfigError, FederationError
from fedmllm.flower.messages import write_answer
from fedmllm.packing import pack, unpack
from fedmllm.run import federation
from fedmllm.run.resident import Resident

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from fedmllm.flower.carrier import ask, enclose, enclosed
from fedmllm.flower.installed import require_flower
from fedmllm.types import ClientFailure
from loopback import LoopbackGrid, Tamper, loopback
from tiny_families import folder_of

RESIDENT = Resident()
SETTINGS: dict[str, Any] = {
    "model": {"name": folder_of("llava")},
    "data": {"dataset": "digits-claims", "num_train": 40, "num_test": 8, "check_images": False},
    "federation": {"num_clients": 4, "clients_per_round": 4, "num_rounds": 2, "min_partition_size": 4, "partition": "iid"},
    "training": {"batch_size": 4, "learning_rate": 3e-3},
    "evaluation": {"every": 0, "baselines": []},
    "engine": {"device": "cpu", "parallel_clients": 1, "name": "flower"},
}

EMBEDDED = {"model": {"name": "nano"}}
"""Wide enough for factors to be smaller than their product, and slow enough to kill a worker in time."""


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch, tamper: Tamper, **failures: Any) -> list[dict[str, Any]]:
    monkeypatch.setattr(federation, "simulation", partial(loopback, tamper=tamper))
    monkeypatch.setattr(federation, "require_flower", lambda *modules: None)
    run.train(Experiment.parse(SETTINGS | {"failures": failures}), folder, resident=RESIDENT, report=False)
    return RunStore(folder).records("federated")


def client_of(reply: Message) -> str:
    return str(unpack(enclosed(reply.content))[1]["client"])


def of_client(change: Tamper, client: str = "client-02") -> Tamper:
    return lambda reply: change(reply) if client_of(reply) == client else reply


def not_a_number(reply: Message) -> Message:
    groups, facts = unpack(enclosed(reply.content))
    first = next(iter(groups["update"]))
    groups["update"][first] = groups["update"][first] * float("nan")
    reply.content = enclose(pack(groups, facts))
    return reply


def absurd(reply: Message) -> Message:
    groups, facts = unpack(enclosed(reply.content))
    reply.content = enclose(pack({**groups, "update": {name: tensor + 100.0 for name, tensor in groups["update"].items()}}, facts))
    return reply


def stale(reply: Message) -> Message:
    groups, facts = unpack(enclosed(reply.content))
    reply.content = enclose(pack(groups, facts | {"round_num": 7}))
    return reply


def boastful(reply: Message) -> Message:
    groups, facts = unpack(enclosed(reply.content))
    reply.content = enclose(pack(groups, facts | {"num_samples": 10**9}))
    return reply


def garbage(reply: Message) -> Message:
    reply.content = enclose(b"\x80\x04garbage")
    return reply


def huge(reply: Message) -> Message:
    reply.content = enclose(bytes(5 << 20))
    return reply


def an_error(reply: Message) -> Message:
    return Message(Error(code=3, reason="Node Unavailable"), reply_to=Message(reply.content, dst_node_id=1, message_type="train"))


def raised(reply: Message) -> Message:
    reply.content = enclose(write_answer(ClientFailure("client-02", "RuntimeError: CUDA out of memory"), 0))
    return reply


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (not_a_number, "the update contains NaN or infinity"),
        (absurd, "the limit is"),
        (boastful, "the update claims 1,000,000,000 training samples, the client reported 10"),
        (stale, "the update answers round 8, expected round"),
        (garbage, "the answer cannot be read: not safetensors written by fedmllm"),
        (huge, "the answer has 5,242,880 bytes, "),
        (an_error, "Flower: Node Unavailable"),
        (raised, "RuntimeError: CUDA out of memory"),
    ],
)
def test_a_bad_answer_is_refused_named_and_left_out(fault: Tamper, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for record in trained(tmp_path / "run", monkeypatch, of_client(fault)):
        assert [row["client"] for row in record["refused"]] == ["client-02"]
        assert reason in record["refused"][0]["reason"]
        assert record["num_samples"] == 30


@pytest.mark.slow
def test_a_run_continues_with_three_of_ten_clients_failing_in_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round three other clients fail, each in another way. The mean is over the seven others."""
    ways: list[Tamper] = [not_a_number, garbage, an_error, absurd, lambda reply: None]
    faults: dict[int, dict[str, Tamper]] = {}

    def fail(reply: Message) -> Message | None:
        round_num, client = (int(unpack(enclosed(reply.content))[1]["round_num"]), client_of(reply))
        if round_num not in faults:
            chosen = random.Random(round_num).sample([f"client-{i:02d}" for i in range(10)], 3)
            faults[round_num] = {name: ways[(round_num + i) % len(ways)] for i, name in enumerate(chosen)}
        change = faults[round_num].get(client)
        return change(reply) if change else reply

    monkeypatch.setitem(SETTINGS, "federation", SETTINGS["federation"] | {"num_clients": 10, "clients_per_round": 10, "num_rounds": 5})
    records = trained(tmp_path / "run", monkeypatch, fail, deadline=0.5, min_updates=7)
    assert [{row["client"] for row in record["refused"]} for record in records] == [faults[i].keys() for i in range(5)]
    assert [record["num_samples"] for record in records] == [28] * 5
    assert all(len(record["losses"]) == 7 for record in records)
    assert 0 <= records[-1]["score"] <= 1


@pytest.mark.parametrize("fault", [not_a_number, absurd, an_error, lambda reply: None], ids=["NaN", "too large", "an error", "late"])
def test_a_client_keeps_its_state_when_its_update_is_not_accepted(fault: Tamper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's SCAFFOLD control stays the mean over all clients. client-02 fails in the second round, client-01 in the last."""

    def spoil(reply: Message) -> Message | None:
        key = (client_of(reply), unpack(enclosed(reply.content))[1]["round_num"])
        return fault(reply) if key in (("client-02", 1), ("client-01", 2)) else reply

    monkeypatch.setitem(SETTINGS, "federation", SETTINGS["federation"] | {"num_rounds": 3, "clients_per_round": 4})
    monkeypatch.setitem(SETTINGS, "algorithm", {"name": "scaffold"})
    records = trained(tmp_path / "run", monkeypatch, spoil, deadline=0.5)
    assert [[row["client"] for row in record["refused"]] for record in records] == [[], ["client-02"], ["client-01"]]
    store = RunStore(tmp_path / "run")
    state, states = store.load_state("federated"), store.client_states("federated")
    assert state is not None
    assert list(state.accepted.values()) == [[1, 2], [0, 1], [0, 2], [1, 2]]
    recording = [states.load(client, rounds)["control"] for client, rounds in state.accepted.items()]
    for name, control in state.slots["control"].items():
        mean = torch.stack([own[name].double() for own in recording]).mean(0)
        torch.testing.assert_close(control.double(), mean, atol=1e-7, rtol=1e-5)


def test_a_missing_answer_fails_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    records = trained(tmp_path / "run", monkeypatch, of_client(lambda reply: None), deadline=0.5)
    assert time.monotonic() - start < 60
    assert [record["refused"] for record in records] == [[{"client": "client-02", "reason": "no answer within the deadline of 0.5 s"}]] * 2


def test_answers_that_arrived_before_the_deadline_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first client never answers. The others' answers arrive while the server waits for it."""
    records = trained(tmp_path / "run", monkeypatch, of_client(lambda reply: None, "client-00"), deadline=0.2)
    assert all([row["client"] for row in record["refused"]] == ["client-00"] for record in records)


def test_at_most_the_requested_number_of_messages_is_in_flight() -> None:
    """The next message is created and sent when the oldest one is answered."""
    app, made = ClientApp(), []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    def contents() -> Iterator[tuple[str, bytes]]:
        for i in range(7):
            made.append(i)
            yield f"c{i}", bytes([i])

    answered = []
    for name, content in ask(LoopbackGrid(app), "train", contents(), {f"c{i}": i for i in range(7) if i != 4}, None, ahead=3):
        answered.append((name, content if isinstance(content, bytes) else content.reason))
        assert len(made) == min(7, len(answered) + 2)
    assert answered == [(f"c{i}", "not connected" if i == 4 else bytes([i])) for i in range(7)]


def test_a_round_without_answers_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FederationError, match=r"round 1: no usable update:\n  - client-00: no answer within the deadline"):
        trained(tmp_path / "run", monkeypatch, lambda reply: None, deadline=0.1)


def test_without_ray_the_engine_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"flower needs not_there; run pip install 'fedmllm\[flower\]'"):
        require_flower("not_there")


@pytest.mark.slow
def test_changes_of_the_frozen_weights_are_sent_as_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages hold exactly the bytes that the rounds count, besides names and settings. They never hold a matrix of full size."""
    grids: list[LoopbackGrid] = []

    @contextmanager
    def recording(*arguments: Any, **named: Any) -> Iterator[Any]:
        with loopback(*arguments, **named) as (grid, nodes):
            grids.append(grid)
            yield grid, nodes

    monkeypatch.setattr(federation, "simulation", recording)
    monkeypatch.setattr(federation, "require_flower", lambda *modules: None)
    rounds = {"federation": SETTINGS["federation"] | {"num_rounds": 3}, "algorithm": {"name": "fedex_lora"}}
    run.train(Experiment.parse(SETTINGS | EMBEDDED | rounds), tmp_path / "run", resident=RESIDENT, report=False)
    tasks = [unpack(enclosed(message.content))[0] for message in grids[0].sent]
    held = [W.num_bytes(*groups.values()) for groups in tasks]
    assert [sum(held[i : i + 4]) for i in (0, 4, 8)] == [record["bytes_down"] for record in RunStore(tmp_path / "run").records("federated")]
    assert {kind for groups in tasks[8:] for kind in groups} == {"weights", "step.2"}


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def workers_of(pid: int) -> list[int]:
    """Ray workers that descend from a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            here, is_worker = int(path.parent.name), path.read_bytes().startswith(b"ray::ClientAppActor")
        except OSError:
            continue
        while is_worker and here > 1 and here != pid:
            here = parent(here)
        if is_worker and here == pid:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for workers in /proc")
def test_a_killed_worker_does_not_change_the_simulations_result(tmp_path: Path) -> None:
    """The command with real workers. One is killed after the first round, and its clients are asked again."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedmllm[flower]'")
    settings = Experiment.parse(SETTINGS | EMBEDDED | {"failures": {"below": "wait", "min_updates": 4, "pause": 2}})
    (tmp_path / "x.yaml").write_text(settings.to_yaml())
    command = [sys.executable, "-m", "fedmllm", "train", "x.yaml", "--track", "none", "federation.num_rounds=3", "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = subprocess.Popen([*command, "here", "engine.name=in_process"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    assert here.wait(120) == 0
    there = subprocess.Popen([*command, "there"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    lines = tmp_path / "there" / "metrics.jsonl"
    until = time.monotonic() + 180
    while not (lines.exists() and lines.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    before = workers_of(there.pid)
    os.kill(before[0], signal.SIGKILL)
    output, _ = there.communicate(timeout=600)
    assert there.returncode == 0, output
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("here", "there"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=1e-5, rtol=0)
    assert not workers_of(there.pid)
