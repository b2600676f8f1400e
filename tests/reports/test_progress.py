from __future__ import annotations

import time
from io import StringIO

import pytest
from rich.console import Console

from fedmllm.algorithms import Remark
from fedmllm.cli.tables import result_table
from fedmllm.engine.stages import Stage
from fedmllm.reports import progress as display
from fedmllm.reports.progress import Display
from fedmllm.run.results import SCORES, RunResult
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


@pytest.mark.parametrize(
    ("silence", "lines"), [(-1.0, ["encoding samples: 1,000 of 2,000", "encoding samples: 2,000 of 2,000"]), (600.0, [])]
)
def test_encoding_progress_is_shown_if_it_takes_long(silence: float, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "SILENCE", silence)
    out = StringIO()
    shows = Display(4, Console(file=out, force_terminal=False, width=80))
    for done in (1000, 2000):
        shows.observer.encoded(done, 2000)
    assert out.getvalue().splitlines() == lines


def test_output_without_a_terminal_is_plain_lines() -> None:
    text = shown(False, [record("federated", 1, 4), record("federated", 2, 4)])
    first, second = text.splitlines()
    assert first.startswith("federated round 1/4  cohort 00  loss 0.500  sent 1.50 MB  left ")
    assert "sent 3.00 MB" in second
    assert "\x1b" not in text


def test_output_in_a_terminal_is_a_live_table() -> None:
    text = shown(True, [record("federated", 1, 4)])
    assert "\x1b[" in text
    for part in ("round", "cohort", "loss", "score", "sent so far: 1.50 MB", "left"):
        assert part in text


def test_the_time_left_counts_rounds_since_the_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six rounds of similar size in total. The run resumes after the third, and each round takes 10 s."""
    clock = iter([0.0, 0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr("fedmllm.reports.progress.time.monotonic", lambda: next(clock))
    text = shown(False, [record("federated", 4, 4), record("centralized", 1, 2), record("centralized", 2, 2)])
    assert [line.rpartition("left ")[2] for line in text.splitlines()] == ["20.0 s", "10.0 s", "0.00 s"]


def test_remarks_about_strategies_are_shown_at_the_start() -> None:
    out = StringIO()
    with Display(4, Console(file=out, width=40)) as display:
        display.observer.remarked(
            {"feature_alignment": Remark("nothing to align", True), "adaptive_regularization": Remark("holds all", False)}
        )
    assert out.getvalue().splitlines() == [
        "feature_alignment has no effect in this run: nothing to align",
        "adaptive_regularization: holds all",
    ]


def test_refused_updates_are_counted() -> None:
    refused = record("federated", 1, 4) | {"refused": [{"client": "client-01", "reason": "NaN"}]}
    assert "(1 refused)" in shown(False, [refused])


def result(clients: dict[str, dict[str, float]]) -> RunResult:
    """A finished run with four clients."""
    scores: dict[str, float | None] = dict.fromkeys(SCORES, 0.5)
    errors: dict[str, float | None] = dict.fromkeys(SCORES, None)
    return RunResult(
        experiment="demo", metric="auc", scores=scores, standard_errors=errors, details={}, local={}, majority=0.5, bytes_up=1, bytes_down=1,
        seconds=1.0, seconds_by_stage={}, seed=0, versions={}, num_rounds=1, num_clients=4, clients_per_round=2, trainable_parameters=1,
        algorithm="fedavg", strategies=[], model="nano", clients=clients,
    )  # fmt: skip


def table_text(clients: dict[str, dict[str, float]]) -> str:
    out = StringIO()
    Console(file=out, width=100).print(result_table(result(clients)))
    return " ".join(out.getvalue().split())


def test_scores_by_client_are_shown_below_the_others() -> None:
    # 0, 0.25, 0.5, 0.75: mean 0.375, standard deviation sqrt(0.3125 / 3) = 0.3227, half of it over four clients.
    text = table_text({"federated": {f"client-0{i}": i / 4 for i in range(4)}, "local": {"client-00": 0.125}})
    assert "federated, accuracy on clients' own kind of samples │ 0.375 │ 0.161" in text
    assert "federated, worst decile of clients │ 0.000 │" in text
    assert "local, accuracy on clients' own kind of samples │ 0.125 │ │" in text
    assert "fine-tuned" not in text


def test_no_rows_for_clients_that_were_not_scored() -> None:
    assert "own kind" not in table_text({})
    assert "own kind" not in table_text({"federated": {}})


def test_outstanding_clients_are_shown() -> None:
    out = StringIO()
    with Display(4, Console(file=out, force_terminal=True, width=140)) as display:
        display.observer.started(STAGES)
        display.observer.answered({"stage": "federated", "round": 1, "clients": [f"site-{i}" for i in range(6)]})
        display.observer.round_done(record("federated", 1, 4))
        display.observer.waiting({"stage": "federated", "round": 2, "attempt": 2, "clients": ["site-5"]})
    assert "waiting for site-0 (5 more after it)" in out.getvalue()
    assert "federated round 2: retrying site-5, attempt 2" in out.getvalue()


def test_a_long_wait_without_a_terminal_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "SILENCE", 0.1)
    out = StringIO()
    with Display(4, Console(file=out, width=100)) as shown:
        shown.observer.started(STAGES)
        for names in (["a", "b", "c"], ["b", "c"], []):
            shown.observer.answered({"stage": "federated", "round": 3, "clients": names})
        time.sleep(0.3)
        assert out.getvalue() == ""
        shown.observer.answered({"stage": "federated", "round": 4, "clients": ["b", "c"]})
        time.sleep(0.4)
        shown.observer.answered({"stage": "federated", "round": 4, "clients": ["c"]})
    time.sleep(0.3)
    assert out.getvalue() == "federated round 4: waiting for b (1 more after it)\n"


def test_a_long_wait_before_the_first_round_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "SILENCE", 0.1)
    out = StringIO()
    with Display(4, Console(file=out, width=100)) as shown:
        shown.observer.answered({"stage": "start", "clients": ["b"]})
        time.sleep(0.3)
        shown.observer.answered({"stage": "start", "clients": []})
    assert out.getvalue() == "waiting for b\n"


def test_sites_that_the_start_waits_for_and_leaves_out_are_shown() -> None:
    out = StringIO()
    tell = Display(3, Console(file=out, width=100)).observer.waiting
    tell({"stage": "start", "clients": ["notes", "both"], "given_up": False})
    tell({"stage": "start", "clients": ["both"], "given_up": True})
    assert out.getvalue() == "waiting for notes, both\nstarting without both\n"


def test_passes_that_did_not_fit_are_shown() -> None:
    assert "out of memory" not in shown(False, [record("federated", 1, 4) | {"halvings": {}}])
    halved = record("federated", 1, 4) | {"halvings": {"client-00": 1, "client-01": 2}}
    assert "(out of memory 2 times, passes halved)" in shown(False, [halved])


def test_a_skipped_round_is_marked() -> None:
    skipped = record("federated", 1, 4) | {"refused": [{"client": "client-01", "reason": "NaN"}], "skipped": True}
    assert "(1 refused, skipped)" in shown(False, [skipped])


def test_the_sent_bytes_include_those_before_an_interruption() -> None:
    """2 MB before the interruption and 1.5 MB after it."""
    console = Console(file=StringIO(), width=200)
    with Display(4, console) as display:
        display.observer.started([Stage("federated", {"a": ()}, 4, 1)])
        display.observer.resumed(2_000_000)
        display.observer.round_done(
            {"stage": "federated", "round": 3, "num_rounds": 4, "clients": ["a"], "loss": None, "score": None, "seconds": {"train": 1.0}}
            | {"bytes_up": 500_000, "bytes_down": 1_000_000, "refused": [], "skipped": False}
        )
    assert isinstance(console.file, StringIO)
    assert "sent 3.50 MB" in console.file.getvalue()
