"""Shows a run's progress: a live display in a terminal, otherwise one plain line per round."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Timer
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fedmllm.engine.observer import START, Observer
from fedmllm.format import duration, human_bytes
from fedmllm.sweeps.runner import Outcome, Places
from fedmllm.types import Record

if TYPE_CHECKING:
    from pathlib import Path

    from fedmllm.algorithms import Remark
    from fedmllm.engine.stages import Stage
    from fedmllm.sweeps.grid import Cell

ROWS = 8
"""Number of rounds that the live display lists."""
SILENCE = 60.0
"""Seconds of silence after which output that is not a terminal gets a line too."""


class Display:
    """Shows round, cohort, loss, score, bytes sent and time left. Use it as a context manager and pass ``observer`` to the run."""

    def __init__(self, num_rounds: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]} {task.fields[waiting]}"),
            console=self._console,
        )
        self._task = self._bar.add_task("starting", total=num_rounds, left="", waiting="")
        self._rows: list[Record] = []
        self._clock = _Clock()
        self._bytes = 0
        self._last_line: float | None = None
        self._silence = Timer(SILENCE, lambda: None)
        self._live = Live(self._bar, console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    @property
    def observer(self) -> Observer:
        """The observer that feeds this display."""
        observer = Observer(self._clock.start, self._round_done, self._waiting, self._answered, self._remarked)
        return replace(observer, resumed=self._resumed, encoded=self._encoded)

    def __enter__(self) -> Display:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._silence.cancel()
        if self._live:
            self._live.__exit__(kind, error, trace)

    def _waiting(self, record: Record) -> None:
        """Print which clients are retried, or which sites the run waits for or starts without."""
        names = ", ".join(record["clients"])
        if record["stage"] == START:
            line = f"starting without {names}" if record["given_up"] else f"waiting for {names}"
        else:
            line = f"{record['stage']} round {record['round']}: retrying {names}, attempt {record['attempt']}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def _remarked(self, remarks: Mapping[str, Remark]) -> None:
        for name, remark in remarks.items():
            line = f"{name} has no effect in this run: {remark.text}" if remark.idle else f"{name}: {remark.text}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _answered(self, record: Record) -> None:
        """Show outstanding clients: at once in a terminal, otherwise after a long wait.

        The run takes answers in order, so it is unknown whether clients after the first have answered.
        """
        names = record["clients"]
        line = f"waiting for {names[0]}" + (f" ({len(names) - 1} more after it)" if names[1:] else "") if names else ""
        self._bar.update(self._task, waiting=line)
        self._silence.cancel()
        if names and self._live is None:
            when = "" if record["stage"] == START else f"{record['stage']} round {record['round']}: "
            self._silence = Timer(SILENCE, partial(self._console.print, when + line, highlight=False, soft_wrap=True))
            self._silence.daemon = True
            self._silence.start()

    def _encoded(self, done: int, total: int) -> None:
        """Show how many samples are encoded: every time in a terminal, otherwise after a long silence."""
        line = f"encoding samples: {done:,} of {total:,}"
        self._bar.update(self._task, waiting="" if done == total else line)
        now = time.monotonic()
        self._last_line = now if self._last_line is None else self._last_line
        if self._live is None and now - self._last_line > SILENCE:
            self._last_line = now
            self._console.print(line, highlight=False, soft_wrap=True)

    def _resumed(self, sent: int) -> None:
        """Start the count at the bytes that were sent before the run was interrupted."""
        self._bytes = sent

    def _round_done(self, record: Record) -> None:
        self._bytes += record.get("bytes_up", 0) + record.get("bytes_down", 0)
        self._clock.advance(record)
        if self._live is None:
            self._console.print(_line(record, self._bytes, self._clock.left()), highlight=False, soft_wrap=True)
            return
        self._rows = [*self._rows, record][-ROWS:]
        self._bar.update(
            self._task,
            description=record["stage"],
            completed=record["round"],
            total=record["num_rounds"],
            left=f"{self._clock.left()} left",
        )
        self._live.update(Group(_rounds_table(self._rows, self._bytes), self._bar))


class _Clock:
    """Estimates the time left from the share of samples trained so far. A resumed run starts in the middle."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        self._costs: dict[str, float] = {}
        self._origin: float | None = None
        self._position = 0.0
        self._begin = time.monotonic()

    def start(self, stages: Sequence[Stage]) -> None:
        """Compute where each stage ends, in samples: the sum of rounds x cohort x mean client size."""
        for stage in stages:
            mean_size = max(1, stage.num_samples) / len(stage.clients)
            self._costs[stage.name] = stage.num_rounds * stage.clients_per_round * mean_size
            self._ends[stage.name] = sum(self._costs.values())
        self._begin = time.monotonic()

    def advance(self, record: Record) -> None:
        """Move the position to the end of a round."""
        if record["num_rounds"] == 0:
            return
        cost = self._costs[record["stage"]]
        self._position = self._ends[record["stage"]] - cost * (1 - record["round"] / record["num_rounds"])
        if self._origin is None:
            self._origin = self._position - cost / record["num_rounds"]

    def left(self) -> str:
        """Return the time left as text, or ``?`` before the first round."""
        if self._origin is None:
            return "?"
        total = max(self._ends.values())
        return duration((time.monotonic() - self._begin) * (total - self._position) / (self._position - self._origin))


def _line(record: Record, sent: int, left: str) -> str:
    """Return a round as one line of plain text."""
    cells = _cells(record)
    known = [name for name in ("cohort", "loss", "validation", "score") if cells[name] != "-" or name in ("cohort", "loss")]
    columns = [f"{record['stage']} round {cells['round']}", *(f"{name} {cells[name]}" for name in known)]
    return "  ".join([*columns, f"sent {human_bytes(sent)}", f"left {left}"])


def _cells(record: Record) -> dict[str, str]:
    loss, score, validation = record.get("loss"), record.get("score"), record.get("validation")
    notes = [*([f"{len(record['refused'])} refused"] if record.get("refused") else []), *(["skipped"] if record.get("skipped") else [])]
    refused = f" ({', '.join(notes)})" if notes else ""
    halvings = max(record.get("halvings", {}).values(), default=0)
    halved = f" (out of memory {halvings} times, passes halved)" if halvings else ""
    return {
        "round": f"{record['round']}/{record['num_rounds']}",
        "cohort": ",".join(c.removeprefix("client-") for c in record.get("clients", [])) + refused + halved or "-",
        "loss": "-" if loss is None else f"{loss:.3f}",
        "validation": "-" if validation is None else f"{validation['score']:.3f}",
        "score": "-" if score is None else f"{score:.3f}",
    }


def _rounds_table(records: Sequence[Record], sent: int) -> Table:
    table = Table(title=f"sent so far: {human_bytes(sent)}", title_justify="left")
    for column in ("stage", "round", "cohort", "loss", "validation", "score"):
        table.add_column(column, justify="left" if column in ("stage", "cohort") else "right")
    for record in records:
        cells = _cells(record)
        table.add_row(record["stage"], *cells.values())
    return table


class SweepDisplay:
    """Prints a line for each finished cell, with the time left.

    Args:
        cells: the cells of this machine's share, including finished ones.
        folder: the sweep folder.
        jobs: number of processes.
        console: the console to print to.
    """

    def __init__(self, cells: Sequence[Cell], folder: Path, jobs: int, console: Console | None = None) -> None:
        self._console, self._jobs, self._total = console or Console(), jobs, len(cells)
        self._done = sum(Places.of(folder, cell).finished for cell in cells)
        self._seconds: list[float] = []
        self._console.print(f"{self._total} cells, {self._done} finished", highlight=False)

    def ended(self, outcome: Outcome) -> None:
        """Print a cell's line."""
        self._done += 1
        self._seconds.append(outcome.seconds)
        left = sum(self._seconds) / len(self._seconds) * (self._total - self._done) / self._jobs
        names = " / ".join(map(str, outcome.cell.labels.values()))
        end = f"failed: {outcome.error}" if outcome.score is None else f"{outcome.score:.3f}"
        self._console.print(
            f"{self._done}/{self._total}  {names}  {end}  {duration(outcome.seconds)}  left {duration(left)}",
            highlight=False,
            soft_wrap=True,
        )
