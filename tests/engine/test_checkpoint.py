from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from fedmllm.algorithms import ServerState
from fedmllm.engine.checkpoint import BackgroundCheckpoint, RunStore
from fedmllm.errors import RunError
from fedmllm.files import write_atomically, write_json
from fedmllm.packing import pack

STATE = ServerState({"a.b/c": torch.randn(2, 3)}, 4, {"momentum": {"a.b/c": torch.randn(2, 3)}}, accepted={"c0": [1, 3], "c1": [2]})


def test_a_state_is_restored_bit_for_bit(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.save_state("s", STATE)
    loaded = store.load_state("s")
    assert loaded is not None
    assert (loaded.round_num, loaded.accepted) == (4, STATE.accepted)
    assert torch.equal(loaded.weights["a.b/c"], STATE.weights["a.b/c"])
    assert torch.equal(loaded.slots["momentum"]["a.b/c"], STATE.slots["momentum"]["a.b/c"])


def test_a_round_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next save and the end of the block wait for the write."""
    store, next_round, written = RunStore(tmp_path), threading.Event(), []

    def slow(store: RunStore, stage: str, state: ServerState) -> None:
        assert next_round.wait(10)
        written.append((stage, state.round_num))

    monkeypatch.setattr(RunStore, "save_state", slow)
    with BackgroundCheckpoint(store, "s") as checkpoint:
        checkpoint.save(STATE)
        assert written == []
        next_round.set()
        checkpoint.save(dataclasses.replace(STATE, round_num=5))
        assert written[0] == ("s", 4)
    assert written == [("s", 4), ("s", 5)]


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path: Path, rounds: int) -> None:
    """The error is raised by the next save, or at the end of the block."""
    (tmp_path / "checkpoints").write_text("in the way")

    def save() -> None:
        with BackgroundCheckpoint(RunStore(tmp_path), "s") as checkpoint:
            for _ in range(rounds):
                checkpoint.save(STATE)

    with pytest.raises(FileExistsError):
        save()


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert RunStore(tmp_path).load_state("s") is None


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, keep: int) -> None:
    store = RunStore(tmp_path)
    store.save_state("s", STATE)
    (path,) = (tmp_path / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RunError, match=r"s\.safetensors: damaged checkpoint"):
        store.load_state("s")


def test_a_checkpoint_without_the_accepted_rounds_is_refused(tmp_path: Path) -> None:
    """Without that list, clients would start from nothing or from a state whose update was refused."""
    write_atomically(tmp_path / "checkpoints" / "s.safetensors", pack({"weights": STATE.weights}, {"round_num": 4}))
    with pytest.raises(RunError, match=r"s\.safetensors: written by an older version .*; delete it to train this stage from the start"):
        RunStore(tmp_path).load_state("s")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"score": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_an_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.append({"stage": "s", "round": 1})
    with store.metrics_file.open("a") as file:
        file.write('{"stage": "s", "rou')
    assert store.records("s") == [{"stage": "s", "round": 1}]
    store.rewind("s", 1)
    store.append({"stage": "s", "round": 2})
    assert [record["round"] for record in store.records("s")] == [1, 2]


def test_rewinding_one_stage_leaves_the_others(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for name in ("a", "b"):
        for round_num in (1, 2):
            store.append({"stage": name, "round": round_num})
    store.rewind("a", 1)
    assert [record["round"] for record in store.records("a")] == [1]
    assert [record["round"] for record in store.records("b")] == [1, 2]


def test_broken_metrics_are_named(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.metrics_file.write_text("{}}\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl: a line is not JSON"):
        store.records("s")


def client_state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"control": {"w": torch.full((2,), value)}}


def test_a_client_loads_the_state_of_its_last_accepted_round(tmp_path: Path) -> None:
    """The update of round 4 was refused. A round that runs a second time overwrites the state left by the first time."""
    states = RunStore(tmp_path).client_states("federated")
    assert states.load("a", []) == states.load("a", [3]) == {}
    for round_num, accepted in ((1, []), (4, [1]), (6, [1])):
        states.save("a", round_num, client_state(round_num), accepted)
    assert states.load("b", [6]) == {}
    assert [float(states.load("a", accepted)["control"]["w"][0]) for accepted in ([1], [1, 6])] == [1, 6]
    states.save("a", 6, client_state(60), [1])
    assert [float(states.load("a", accepted)["control"]["w"][0]) for accepted in ([1], [1, 6])] == [1, 60]


def test_old_client_states_are_deleted(tmp_path: Path) -> None:
    """Rounds 8 to 10 of twelve are refused. Saving a state late, after the next round has begun, removes no other state."""
    states, accepted = RunStore(tmp_path).client_states("federated"), list[int]()
    for round_num in range(12):
        states.save("a", round_num, client_state(round_num), accepted)
        if round_num not in (8, 9, 10):
            accepted = [*accepted, round_num][-2:]
    states.save("a", 10, client_state(10), [6, 7])
    folder = tmp_path / "checkpoints" / "federated-clients" / "a"
    assert {path.stem for path in folder.iterdir()} == {"6", "7", "10", "11"}
    states.save("a", 12, client_state(12), [7, 11])
    assert {path.stem for path in folder.iterdir()} == {"7", "11", "12"}


def test_a_damaged_client_state_is_named(tmp_path: Path) -> None:
    states = RunStore(tmp_path).client_states("federated")
    states.save("a", 0, client_state(1.0), [])
    (path,) = (tmp_path / "checkpoints" / "federated-clients" / "a").iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(RunError, match=r"a/0\.safetensors: damaged checkpoint .*start the run again"):
        states.load("a", [0])
