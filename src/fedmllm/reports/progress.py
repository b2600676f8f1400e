"""What a run shows while it goes: a live display in a terminal, one plain line per round elsewhere."""

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
"""Rounds listed in the live display."""
SILENCE = 60.0
"""Seconds without an answer after which it is said elsewhere too."""


class Display:
    """Shows round, cohort, loss, score, bytes sent and time left. Use as a context; pass ``observer`` to the run."""

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
        self._said: float | None = None
        self._silence = Timer(SILENCE, lambda: None)
        self._live = Live(self._bar, console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    @property
    def observer(self) -> Observer:
        """To be told about the run."""
        told = Observer(self._clock.start, self._round_done, self._waiting, self._answered, self._remarked)
        return replace(told, resumed=self._resumed, encoded=self._encoded)

    def __enter__(self) -> Display:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._silence.cancel()
        if self._live:
            self._live.__exit__(kind, error, trace)

    def _waiting(self, record: Record) -> None:
        """Say for whom."""
        names = ", ".join(record["clients"])
        if record["stage"] == START:
            words = f"begins without {names}" if record["given_up"] else f"waits for {names}"
        else:
            words = f"{record['stage']} round {record['round']} waits for {names}, asked for the {_nth(record['attempt'])} time"
        self._console.print(words, highlight=False, soft_wrap=True)

    def _remarked(self, remarks: Mapping[str, Remark]) -> None:
        for name, remark in remarks.items():
            words = f"{name} changes nothing in this run: {remark.text}" if remark.idle else f"{name}: {remark.text}"
            self._console.print(words, highlight=False, soft_wrap=True)

    def _answered(self, record: Record) -> None:
        """For whom is waited now: at once in a terminal, elsewhere if it is for long. Answers are taken in order; whether those after it are there
        is not known."""
        names = record["clients"]
        words = f"waits for {names[0]}" + (f", {len(names) - 1} more after it" if names[1:] else "") if names else ""
        self._bar.update(self._task, waiting=words)
        self._silence.cancel()
        if names and self._live is None:
            when = "" if record["stage"] == START else f"{record['stage']} round {record['round']} "
            self._silence = Timer(SILENCE, partial(self._console.print, when + words, highlight=False, soft_wrap=True))
            self._silence.daemon = True
            self._silence.start()

    def _encoded(self, done: int, total: int) -> None:
        """How many samples have been looked at: in a terminal each time, elsewhere once it is long since anything was said."""
        words = f"looks at samples: {done:,} of {total:,}"
        self._bar.update(self._task, waiting="" if done == total else words)
        now = time.monotonic()
        self._said = now if self._said is None else self._said
        if self._live is None and now - self._said > SILENCE:
            self._said = now
            self._console.print(words, highlight=False, soft_wrap=True)

    def _resumed(self, sent: int) -> None:
        """Count on from what was sent before the run was interrupted."""
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


def _nth(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


class _Clock:
    """Guesses the time left from where the run stands, in samples to train on; a resumed run starts in the middle."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}
        self._costs: dict[str, float] = {}
        self._origin: float | None = None
        self._position = 0.0
        self._begin = time.monotonic()

    def start(self, stages: Sequence[Stage]) -> None:
        """Lay the stages end to end: rounds x cohort x mean client size."""
        for stage in stages:
            mean_size = max(1, stage.num_samples) / len(stage.clients)
            self._costs[stage.name] = stage.num_rounds * stage.clients_per_round * mean_size
            self._ends[stage.name] = sum(self._costs.values())
        self._begin = time.monotonic()

    def advance(self, record: Record) -> None:
        """Move to the end of a round."""
        if record["num_rounds"] == 0:
            return
        cost = self._costs[record["stage"]]
        self._position = self._ends[record["stage"]] - cost * (1 - record["round"] / record["num_rounds"])
        if self._origin is None:
            self._origin = self._position - cost / record["num_rounds"]

    def left(self) -> str:
        """In words, or ``?`` before the first round."""
        if self._origin is None:
            return "?"
        total = max(self._ends.values())
        return duration((time.monotonic() - self._begin) * (total - self._position) / (self._position - self._origin))


def _line(record: Record, sent: int, left: str) -> str:
    """One round in plain text."""
    cells = _cells(record)
    told = [name for name in ("cohort", "loss", "validation", "score") if cells[name] != "-" or name in ("cohort", "loss")]
    parts = [f"{record['stage']} round {cells['round']}", *(f"{name} {cells[name]}" for name in told)]
    return "  ".join([*parts, f"sent {human_bytes(sent)}", f"left {left}"])


def _cells(record: Record) -> dict[str, str]:
    loss, score, validation = record.get("loss"), record.get("score"), record.get("validation")
    refused = f" ({len(record['refused'])} refused{', skipped' if record.get('skipped') else ''})" if record.get("refused") else ""
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
    """A line for each cell that ends, and how much is left.

    Args:
        cells: of this sitting's share, finished ones included.
        folder: the sweep's.
        jobs: processes at work.
        console: where to print.
    """

    def __init__(self, cells: Sequence[Cell], folder: Path, jobs: int, console: Console | None = None) -> None:
        self._console, self._jobs, self._total = console or Console(), jobs, len(cells)
        self._done = sum(Places.of(folder, cell).finished for cell in cells)
        self._seconds: list[float] = []
        self._console.print(f"{self._total} cells, {self._done} of them finished", highlight=False)

    def told(self, outcome: Outcome) -> None:
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
