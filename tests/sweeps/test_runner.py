"""The training of a grid's cells: shares, failures, locks and kills."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.config import Experiment
from fedmllm.errors import ConfigError, RunError
from fedmllm.sweeps.code_version import code_version
from fedmllm.sweeps.grid import Cell
from fedmllm.sweeps.runner import Places, failures, require_sources, run_sweep, share
from run_folders import SMALL, small


def scores(output: Path) -> dict[str, float]:
    """Federated scores by cell name."""
    found = {}
    for path in (output / "cells").glob("*.json"):
        labels = json.loads(path.read_text())
        found["/".join(str(labels[name]) for name in ("method", "scenario", "seed"))] = json.loads(
            (path.with_suffix("") / "result.json").read_text()
        )["scores"]["federated"]
    return found


@given(st.integers(0, 40), st.integers(1, 7))
def test_shares_cover_every_cell_once(count: int, shares: int) -> None:
    every = [Cell("m", "d", seed, "s", "x", Experiment()) for seed in range(count)]
    assert [cell for i in range(shares) for cell in share(every, f"{i}/{shares}")] == every


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "1", "a/b", "0/0"])
def test_invalid_shares_are_refused(shard: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid share"):
        share([], shard)


def test_finished_cells_are_kept_and_failed_ones_retried(tmp_path: Path) -> None:
    wild = {"wild": {"algorithm": {"name": "fedavg"}, "training": {"learning_rate": 1e30}}}
    found = small(rows=[{"methods": wild}])
    outcomes = run_sweep(found, tmp_path)
    assert [outcome.score is None for outcome in outcomes] == [False, False, True]
    assert "no usable update" in outcomes[2].error
    (failure,) = failures(tmp_path)
    assert failure.startswith("nano / claims / 0 / aligned / wild: ")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert [outcome.cell.method for outcome in run_sweep(found, tmp_path)] == ["wild"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before
    assert not list(tmp_path.rglob("checkpoints/*.safetensors")) or [Places.of(tmp_path, found[2]).folder] == [
        path.parent for path in tmp_path.rglob("checkpoints")
    ]
    assert not list(tmp_path.rglob("*.lock"))
    labels = json.loads(Places.of(tmp_path, found[0]).names.read_text())
    assert labels == found[0].labels | {"code": code_version()}


def test_missing_sources_are_reported_before_training(tmp_path: Path) -> None:
    """All missing sources are named at once, each folder once."""
    parts = [{"dataset": "vqa_rad", "root": "gone/vqa"}, {"dataset": "digits-cards"}]
    found = small(
        datasets={"mix": {"data": {"dataset": "mixture", "num_train": None, "num_test": None, "options": {"parts": parts}}}, "claims": {}},
        models={"there": {}, "lost": {"model": {"name": "./gone/model"}}},
        seeds=[0, 1],
    )
    with pytest.raises(RunError) as caught:
        require_sources(found, tmp_path / "grid.yaml")
    assert str(caught.value).count("gone/vqa: no such data folder") == 1
    assert str(caught.value).count("'./gone/model' is not a folder") == 1
    assert "the comments in" in str(caught.value)
    require_sources(small(), tmp_path / "grid.yaml")


def test_a_cell_locked_by_another_process_is_left_to_it(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    cell, _ = small()
    places = Places.of(tmp_path, cell)
    places.folder.parent.mkdir(parents=True)
    with places.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (outcome,) = run_sweep([cell], tmp_path)
    assert "another process works on this cell" in outcome.error
    assert failures(tmp_path) == []


@pytest.mark.slow
def test_a_kill_and_parallel_processes_do_not_change_scores(tmp_path: Path) -> None:
    """A sweep that is killed in its first cell and continues in two processes has the scores of an uninterrupted one."""
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(SMALL))
    expected = run_sweep(small(), tmp_path / "one", threads=1)
    assert scores(tmp_path / "one") == {f"{outcome.cell.method}/aligned/0": outcome.score for outcome in expected}
    command = [sys.executable, "-m", "fedmllm", "sweep", str(tmp_path / "grid.yaml"), "--threads", "1", "--output"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    while not any("federated" in path.read_text() for path in (tmp_path / "killed").rglob("metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = subprocess.run([*command, str(tmp_path / "killed"), "--jobs", "2"], capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert "leaked" not in again.stderr
    assert "2 cells, 0 finished" in again.stdout
    assert scores(tmp_path / "killed") == scores(tmp_path / "one")


def test_a_killed_process_ends_the_sweep_with_an_explained_error(tmp_path: Path) -> None:
    """As when the system kills a process for lack of memory. The error has no traceback."""

    def kill() -> None:
        until = time.monotonic() + 60
        while not (children := active_children()) and time.monotonic() < until:
            time.sleep(0.05)
        children[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(RunError, match=r"a process of the sweep was killed, perhaps because memory ran out; .* run the same command again"):
        run_sweep(small(), tmp_path, jobs=2)
    thread.join(60)
