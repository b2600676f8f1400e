"""Interrupted runs end bit for bit as uninterrupted ones."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.engine.observer import Observer
from fedmllm.types import Record
from scripted import cut_short
from trained_runs import change, comparable, count_lines


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = comparable(finished)
    seen: list[Record] = []
    train(Experiment.load(finished / "config.yaml"), finished, name="demo", resume=True, observer=Observer(round_done=seen.append))
    assert seen == []
    assert comparable(finished) == before


@pytest.mark.parametrize("method", ["scaffold", pytest.param("ditto", marks=pytest.mark.slow)])
def test_a_run_interrupted_after_and_within_a_round_ends_bit_for_bit_the_same(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Methods whose clients keep state. The run stops between rounds, and then before a checkpoint is written."""
    experiment = change(tiny, algorithm={"name": method}, federation={"num_rounds": 3}, evaluation={"every": 0, "client_samples": 5})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(experiment, whole, name="x")

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(experiment, parts, name="x", observer=Observer(round_done=stop))
    with cut_short(monkeypatch, 0):
        train(experiment, parts, name="x", resume=True)
    assert count_lines(parts) == 3
    assert list((parts / "checkpoints" / "federated-clients").glob("*/2.safetensors"))
    train(experiment, parts, name="x", resume=True)
    assert count_lines(parts) == 3
    assert comparable(parts) == comparable(whole)


RESUMED = """
data: {dataset: digits-claims, num_train: 64, num_test: 16}
federation: {num_clients: 4, clients_per_round: 2, num_rounds: 14, scenario: missing-0.3}
lora: {dropout: 0.1}
evaluation: {every: 3, baselines: [zero_shot, centralized]}
engine: {device: cpu}
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    """Five SIGKILLs, each at a moment between a session's first line and the end of the run."""
    (tmp_path / "demo.yaml").write_text(RESUMED)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(tmp_path, whole).wait() == 0
    rng, kills = random.Random(0), 0
    while True:
        process = start(tmp_path, parts, *(["--resume"] if (parts / "config.yaml").exists() else []))
        if kills < 5:
            wait_for_progress(process, parts)
            time.sleep(rng.uniform(0, 0.35))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        code = process.wait()
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
    assert kills == 5
    assert comparable(parts) == comparable(whole)


def start(folder: Path, output: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedmllm", "train", "demo.yaml", "--output", str(output), *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_progress(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until the process has trained a round in this session or has ended."""
    lines = count_lines(folder)
    while process.poll() is None and count_lines(folder) <= lines:
        time.sleep(0.005)
