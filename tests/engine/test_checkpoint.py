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


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.save_state("s", STATE)
    loaded = store.load_state("s")
    assert loaded is not None
    assert (loaded.round_num, loaded.accepted) == (4, STATE.accepted)
    assert torch.equal(loaded.weights["a.b/c"], STATE.weights["a.b/c"])
    assert torch.equal(loaded.slots["momentum"]["a.b/c"], STATE.slots["momentum"]["a.b/c"])


def test_a_round_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one waits for it, and so does the end of the block."""
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
    """At the next one, or at the end."""
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


def test_a_checkpoint_without_word_of_whose_updates_were_accepted_is_refused(tmp_path: Path) -> None:
    """Clients would go on from nothing, or from what the server refused."""
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


def test_a_line_cut_short_is_forgotten(tmp_path: Path) -> None:
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


def kept(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"control": {"w": torch.full((2,), value)}}


def test_a_client_finds_what_it_kept_in_its_last_accepted_turn(tmp_path: Path) -> None:
    """That of round 4 was refused. A round that was cut short leaves a file of its own behind, which the round's second run must not see."""
    states = RunStore(tmp_path).client_states("federated")
    assert states.load("a", []) == states.load("a", [3]) == {}
    for round_num, accepted in ((1, []), (4, [1]), (6, [1])):
        states.save("a", round_num, kept(round_num), accepted)
    assert states.load("b", [6]) == {}
    assert [float(states.load("a", accepted)["control"]["w"][0]) for accepted in ([1], [1, 6])] == [1, 6]
    states.save("a", 6, kept(60), [1])
    assert [float(states.load("a", accepted)["control"]["w"][0]) for accepted in ([1], [1, 6])] == [1, 60]


def test_clients_files_do_not_pile_up(tmp_path: Path) -> None:
    """Of twelve turns those of rounds 8 to 10 were refused; one that ends late, after the next was asked for, takes nothing away."""
    states, accepted = RunStore(tmp_path).client_states("federated"), list[int]()
    for round_num in range(12):
        states.save("a", round_num, kept(round_num), accepted)
        if round_num not in (8, 9, 10):
            accepted = [*accepted, round_num][-2:]
    states.save("a", 10, kept(10), [6, 7])
    folder = tmp_path / "checkpoints" / "federated-clients" / "a"
    assert {path.stem for path in folder.iterdir()} == {"6", "7", "10", "11"}
    states.save("a", 12, kept(12), [7, 11])
    assert {path.stem for path in folder.iterdir()} == {"7", "11", "12"}


def test_a_damaged_client_state_is_named(tmp_path: Path) -> None:
    states = RunStore(tmp_path).client_states("federated")
    states.save("a", 0, kept(1.0), [])
    (path,) = (tmp_path / "checkpoints" / "federated-clients" / "a").iterdir()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(RunError, match=r"a/0\.safetensors: damaged checkpoint .*start the run again"):
        states.load("a", [0])
