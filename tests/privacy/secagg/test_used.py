from __future__ import annotations

import os
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from fedmllm.errors import FederationError, RunError
from fedmllm.privacy.secagg.messages import RoundId
from fedmllm.privacy.secagg.used import UsedRounds

CLAIMER = """
import sys
from pathlib import Path
from fedmllm.privacy.secagg.messages import RoundId
from fedmllm.privacy.secagg.used import UsedRounds

for number in range(1_000_000):
    UsedRounds(Path(sys.argv[1])).claim(RoundId("run", "federated", number))
    print(number, flush=True)  # the masked vector
"""


def test_a_round_is_used_by_run_stage_and_number(tmp_path: Path) -> None:
    used = UsedRounds(tmp_path / "new" / "used.jsonl")
    rounds = [RoundId(run, stage, number) for run in ("a", "b") for stage in ("x", "y") for number in (1, 2)]
    for round_id in rounds:
        used.require_unused(round_id)
        used.claim(round_id)
    for round_id in rounds:
        with pytest.raises(FederationError, match=f"did so for {round_id}"):
            UsedRounds(used.path).require_unused(round_id)
        with pytest.raises(FederationError, match=f"did so for {round_id}"):
            UsedRounds(used.path).claim(round_id)
    assert used.path.read_text().count("\n") == 8


def test_names_cannot_imitate_each_other(tmp_path: Path) -> None:
    used = UsedRounds(tmp_path / "used.jsonl")
    used.claim(RoundId('a", "stage": "x', "y\n", 1))
    used.claim(RoundId("a", 'x", "stage": "y\n', 1))
    used.claim(RoundId("ä", "x", 1))
    assert used.path.read_text().count("\n") == 3
    with pytest.raises(FederationError, match="masks one vector"):
        used.claim(RoundId("ä", "x", 1))


def test_a_line_that_a_crash_cut_off_counts_as_unused(tmp_path: Path) -> None:
    used = UsedRounds(tmp_path / "used.jsonl")
    used.claim(RoundId("run", "x", 1))
    used.claim(RoundId("run", "x", 2))
    used.path.write_bytes(used.path.read_bytes()[:-5])
    used.require_unused(RoundId("run", "x", 2))
    used.claim(RoundId("run", "x", 3))
    used.claim(RoundId("run", "x", 2))
    assert [line[-2] for line in used.path.read_text().splitlines()] == ["1", "3", "2"]
    for number in (1, 2, 3):
        with pytest.raises(FederationError, match="masks one vector"):
            used.require_unused(RoundId("run", "x", number))


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    used = UsedRounds(tmp_path / "used.jsonl")
    used.claim(RoundId("run", "x", 1))
    good = used.path.read_bytes()
    for bad in (b"\0\0\n", b"[]\n", b"{}\n", good[:-9] + good):
        used.path.write_bytes(bad + good)
        with pytest.raises(RunError, match=r"used.jsonl:1: not a line"):
            used.require_unused(RoundId("run", "x", 2))
    for ask in (used.claim, used.require_unused):
        with pytest.raises(RunError, match=r"used.jsonl:1: not a line of a list of used rounds; restore the file"):
            ask(RoundId("run", "x", 2))


def _claim(path: Path, results: object) -> None:
    taken = 0
    for number in range(40):
        try:
            UsedRounds(path).claim(RoundId("run", "x", number))
            taken += 1
        except FederationError:
            pass
    results.put(taken)  # type: ignore[attr-defined]


def test_of_several_processes_one_gets_a_round(tmp_path: Path) -> None:
    context = get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_claim, args=(tmp_path / "used.jsonl", results)) for _ in range(3)]
    for process in processes:
        process.start()
    taken = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert sum(taken) == 40


@pytest.mark.slow
def test_a_claim_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "used.jsonl"
    process = subprocess.Popen([sys.executable, "-c", CLAIMER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(10):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    released = 10 + sum(line.endswith("\n") for line in process.stdout.read().splitlines(keepends=True))
    process.wait()
    process.stdout.close()
    for number in range(released):
        with pytest.raises(FederationError, match="masks one vector"):
            UsedRounds(path).claim(RoundId("run", "federated", number))
