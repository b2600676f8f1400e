from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedmllm.algorithms import ServerState
from fedmllm.engine.checkpoint import RunStore, write_atomically, write_json
from fedmllm.errors import RunError

STATE = ServerState({"a.b/c": torch.randn(2, 3)}, 4, {"momentum": {"a.b/c": torch.randn(2, 3)}})


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.save_state("s", STATE)
    loaded = store.load_state("s")
    assert loaded is not None
    assert loaded.round_num == 4
    assert torch.equal(loaded.weights["a.b/c"], STATE.weights["a.b/c"])
    assert torch.equal(loaded.slots["momentum"]["a.b/c"], STATE.slots["momentum"]["a.b/c"])


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
