from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from fedmllm.display import Display
from fedmllm.engine.rounds import Stage
from fedmllm.types import Record, Sample

SAMPLES = [Sample(str(i), "q", "a", {"text": "t"}) for i in range(10)]
STAGES = [Stage("federated", {"client-00": SAMPLES, "client-01": SAMPLES}, 4, 1), Stage("centralized", {"client-00": SAMPLES}, 2, 1)]


def record(stage: str, round_num: int, num_rounds: int) -> Record:
    return {
        "stage": stage, "round": round_num, "num_rounds": num_rounds, "clients": ["client-00"], "loss": 0.5, "score": None, "num_samples": 10,
        "bytes_up": 1_000_000, "bytes_down": 500_000, "refused": [],
    }  # fmt: skip


def shown(terminal: bool, records: list[Record]) -> str:
    out = StringIO()
    with Display(4, Console(file=out, force_terminal=terminal, width=100)) as display:
        display.observer.started(STAGES)
        for item in records:
            display.observer.round_done(item)
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    text = shown(False, [record("federated", 1, 4), record("federated", 2, 4)])
    first, second = text.splitlines()
    assert first.startswith("federated round 1/4  cohort 00  loss 0.500  score -  sent 1.50 MB  left ")
    assert "sent 3.00 MB" in second
    assert "\x1b" not in text


def test_a_live_table_in_a_terminal() -> None:
    text = shown(True, [record("federated", 1, 4)])
    assert "\x1b[" in text
    for part in ("round", "cohort", "loss", "score", "sent so far: 1.50 MB", "left"):
        assert part in text


def test_time_left_counts_from_where_the_run_was_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rounds of like size in all; resumed after the third, each takes 10 s."""
    clock = iter([0.0, 0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr("fedmllm.display.time.monotonic", lambda: next(clock))
    text = shown(False, [record("federated", 4, 4), record("centralized", 1, 2), record("centralized", 2, 2)])
    assert [line.rpartition("left ")[2] for line in text.splitlines()] == ["20.0 s", "10.0 s", "0.00 s"]


def test_refused_updates_are_counted() -> None:
    refused = record("federated", 1, 4) | {"refused": [{"client": "client-01", "reason": "NaN"}]}
    assert "(1 refused)" in shown(False, [refused])
