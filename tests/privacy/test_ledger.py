from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from fedmllm.errors import RunError
from fedmllm.privacy.accounting import Releases
from fedmllm.privacy.ledger import Ledger

SPENDER = """
import sys
from pathlib import Path
from fedmllm.privacy.accounting import Releases
from fedmllm.privacy.ledger import Ledger

ledger = Ledger(Path(sys.argv[1]))
for round_num in range(1_000_000):
    ledger.spend(Releases(1.5), round=round_num)
    print(round_num, flush=True)  # the release itself
"""


def test_what_is_spent_is_read_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "new" / "privacy.jsonl")
    assert ledger.releases() == []
    ledger.spend(Releases(1.5), stage="federated", round=1)
    ledger.spend(Releases(0.7, 12, 0.05), run="a")
    assert ledger.lines()[0] == {"noise_multiplier": 1.5, "count": 1, "rate": 1.0, "stage": "federated", "round": 1}
    assert Ledger(ledger.path).releases() == [Releases(1.5), Releases(0.7, 12, 0.05)]


@pytest.mark.parametrize("torn", ['{"noise_multi', "[]", "{}", '{"noise_multiplier": 0, "count": 1, "rate": 1}', "null"])
def test_a_line_that_is_no_release_is_an_error_and_swallows_no_other(tmp_path: Path, torn: str) -> None:
    ledger = Ledger(tmp_path / "privacy.jsonl")
    ledger.spend(Releases(1.5))
    with ledger.path.open("a") as file:
        file.write(torn)
    ledger.spend(Releases(2.0))
    with pytest.raises(RunError, match=r"privacy.jsonl:2: not a line of a privacy ledger .*; if a crash cut it off"):
        ledger.releases()
    lines = ledger.path.read_text().splitlines()
    ledger.path.write_text("\n".join([lines[0], lines[2]]) + "\n")
    assert ledger.releases() == [Releases(1.5), Releases(2.0)]


def test_a_ledger_that_cannot_be_written_names_its_path(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        Ledger(tmp_path / "folder").spend(Releases(1.0))
    assert caught.value.filename == str(tmp_path / "folder")


def _spend(path: Path, who: int) -> None:
    for number in range(50):
        Ledger(path).spend(Releases(1.0), who=who, number=number)


def test_processes_that_spend_at_once_lose_no_line(tmp_path: Path) -> None:
    path, context = tmp_path / "privacy.jsonl", get_context("fork")
    processes = [context.Process(target=_spend, args=(path, who)) for who in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted((line["who"], line["number"]) for line in Ledger(path).lines()) == [(who, n) for who in range(3) for n in range(50)]


@pytest.mark.slow
def test_a_release_that_happened_is_in_the_ledger_whenever_the_process_is_killed(tmp_path: Path) -> None:
    """Twenty kills at random moments. The ledger has every round that was released, and at most one more."""
    draw = random.Random(0)
    for attempt in range(20):
        path = tmp_path / f"{attempt}.jsonl"
        process = subprocess.Popen([sys.executable, "-c", SPENDER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(draw.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        released = 1 + sum(line.endswith("\n") for line in process.stdout.read().splitlines(keepends=True))
        process.wait()
        process.stdout.close()
        assert released <= len(Ledger(path).releases()) <= released + 1
