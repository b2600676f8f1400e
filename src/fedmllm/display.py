"""What a run shows while it goes: a live display in a terminal, one plain line per round elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from statistics import mean
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from fedmllm.benchmark.drawing import LOOKS, MODELS, duration, human_bytes
from fedmllm.benchmark.results import SCORES, RunResult, worst_decile
from fedmllm.benchmark.run import Observer
from fedmllm.benchmark.sweep import Outcome, Places
from fedmllm.evaluation.metrics import error_over_models
from fedmllm.types import Record

if TYPE_CHECKING:
    from pathlib import Path

    from fedmllm.benchmark.grid import Cell
    from fedmllm.engine.rounds import Stage

ROWS = 8
"""Rounds listed in the live display."""
WAITING = 4
"""Clients named there of those that a round waits for."""


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
        self._live = Live(self._bar, console=self._console, refresh_per_second=4) if self._console.is_terminal else None

    @property
    def observer(self) -> Observer:
        """To be told about the run."""
        return Observer(self._clock.start, self._round_done, self._waiting, self._answered)

    def __enter__(self) -> Display:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.__exit__(kind, error, trace)

    def _waiting(self, record: Record) -> None:
        """Say for whom."""
        names = ", ".join(record["clients"])
        if record["stage"] == "start":
            words = f"begins without {names}" if record["given_up"] else f"waits for {names}"
        else:
            words = f"{record['stage']} round {record['round']} waits for {names}, asked for the {_nth(record['attempt'])} time"
        self._console.print(words, highlight=False, soft_wrap=True)

    def _answered(self, record: Record) -> None:
        """In a terminal, for whom the round waits now."""
        names = record["clients"]
        shown = ", ".join(names[:WAITING]) + (f" and {len(names) - WAITING} more" if len(names) > WAITING else "")
        self._bar.update(self._task, waiting=f"waits for {shown}" if names else "")

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
            mean_size = stage.num_samples / len(stage.clients)
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
    parts = [f"{record['stage']} round {cells['round']}", *(f"{name} {cells[name]}" for name in ("cohort", "loss", "score"))]
    return "  ".join([*parts, f"sent {human_bytes(sent)}", f"left {left}"])


def _cells(record: Record) -> dict[str, str]:
    loss, score = record.get("loss"), record.get("score")
    refused = f" ({len(record['refused'])} refused{', skipped' if record.get('skipped') else ''})" if record.get("refused") else ""
    return {
        "round": f"{record['round']}/{record['num_rounds']}",
        "cohort": ",".join(c.removeprefix("client-") for c in record.get("clients", [])) + refused or "-",
        "loss": "-" if loss is None else f"{loss:.3f}",
        "score": "-" if score is None else f"{score:.3f}",
    }


def _rounds_table(records: Sequence[Record], sent: int) -> Table:
    table = Table(title=f"sent so far: {human_bytes(sent)}", title_justify="left")
    for column in ("stage", "round", "cohort", "loss", "score"):
        table.add_column(column, justify="left" if column in ("stage", "cohort") else "right")
    for record in records:
        cells = _cells(record)
        table.add_row(record["stage"], cells["round"], cells["cohort"], cells["loss"], cells["score"])
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


def result_table(result: RunResult) -> Table:
    """The scores, each with its standard error; below them the clients' on samples of their own kind."""
    title = f"{result.experiment}: {result.metric} of {result.algorithm}, {result.num_clients} clients, {result.num_rounds} rounds, seed {result.seed}"
    table = Table("", result.metric, "standard error", title=title, title_justify="left")
    for name in SCORES:
        score, error = result.scores[name], result.standard_errors[name]
        if score is not None:
            table.add_row(
                LOOKS[name].name, f"{score:.3f}", "" if error is None else f"{error:.3f}", style="bold" if name == "federated" else ""
            )
    if result.majority is not None:
        table.add_row("majority answer", f"{result.majority:.3f}", "")
    for copy, scores in result.tested.items():
        table.add_row(f"federated, tested on {copy}", f"{scores['score']:.3f}", f"{scores['standard_error']:.3f}")
    _add_clients(table, result)
    table.caption = (
        f"{human_bytes(result.bytes_up)} up, {human_bytes(result.bytes_down)} down, {duration(result.seconds)} of training and evaluation"
    )
    table.caption_justify = "left"
    return table


def _add_clients(table: Table, result: RunResult) -> None:
    """What the models are worth to each client by itself."""
    if result.clients:
        table.add_section()
    for model, look in MODELS.items():
        if scores := result.clients.get(model, {}).values():
            error = error_over_models(scores)
            table.add_row(f"{look.name}, clients' own kind, accuracy", f"{mean(scores):.3f}", "" if error is None else f"{error:.3f}")
            table.add_row(f"{look.name}, worst decile of clients", f"{worst_decile(scores):.3f}", "")


MAX_CLIENTS = 50
"""Clients listed in a split's table; more are only counted."""


def split_view(record: Record) -> Group:
    """A split: where it comes from, each client's samples, and one sample before and after it is worded."""
    clients, test = record["clients"], record["test"]
    title = f"{record['dataset']}, {record['scenario']}, seed {record['seed']}: {sum(c['num_samples'] for c in clients):,} training samples"
    table = Table("client", "samples", "by label", "by modalities", title=title, title_justify="left")
    for row in clients[:MAX_CLIENTS]:
        table.add_row(row["id"], f"{row['num_samples']:,}", _counted(row["labels"]), _counted(row["modalities"]))
    if len(clients) > MAX_CLIENTS:
        table.add_row(f"... and {len(clients) - MAX_CLIENTS:,} more", "", "", "")
    table.add_row("test", f"{test['num_samples']:,}", _counted(test["labels"]), _counted(test["modalities"]))
    notes = [*record["notes"], *([f"{record['dropped']:,} samples lost every modality"] if record["dropped"] else [])]
    return Group(table, *(f"- {escape(note)}" for note in notes), "", *_example_lines(record["example"]))


def _counted(counts: dict[str, int]) -> str:
    return escape(", ".join(f"{name} {count:,}" for name, count in counts.items()))


def _example_lines(example: Record) -> list[str]:
    """The sample as stored, then as the model is asked in either wording."""
    stored = [f"sample {example['id']}", *(f"  {name}: {value}" for name, value in example["content"].items())]
    stored += [
        f"  question: {example['question']}",
        f"  options: {', '.join(example['options']) or 'none'}",
        f"  answer: {example['answer']}",
    ]
    asked = [f"\n{style} wording\n{example[style]}\n=> {example['target']}" for style in ("specific", "agnostic")]
    return [escape(line) for line in (*stored, *asked)]


WORDS = {
    "exact": "exact",
    "heterogeneous_ranks": "ranks may differ",
    "personalized": "a model per client",
    "streams": "streams",
    "client": "changes how clients train",
    "weight": "changes what updates weigh",
}
"""How the properties of methods, and what strategies change, are put."""

NOTES = (
    "up, down, keeps: LoRA adapters per client and round, with K clients in the round",
    "streams: no update is needed by itself, so that the server's memory does not grow with the cohort",
)


def methods_view(record: Record) -> Group:
    """Every method, then every strategy: its name and traits, what it does, where it comes from, and its parameters."""
    parts: list[RenderableType] = []
    for group, traits in (("methods", _method_traits), ("strategies", _strategy_traits)):
        for name, row in record[group].items():
            parameters = ", ".join(f"{key}: {json.dumps(value)}" for key, value in row["parameters"].items())
            lines = [row["summary"], row["reference"], *([f"parameters  {parameters}"] if parameters else [])]
            parts += [Text(name, style="bold"), Padding(Text("\n".join(["; ".join(traits(row)), *lines])), (0, 0, 1, 2))]
    return Group(*parts, *NOTES)


def plan_view(record: Record) -> Group:
    """A model's plan: what it has and sends, then memory by the size of a pass, then the largest pass by card."""
    table = Table(show_header=False)
    for name, value in (
        ("parameters", f"{record['parameters']:,}"),
        ("trained", f"{record['trainable']:,}"),
        ("sent by a client in a round, and received", human_bytes(record["sent_per_client_and_round"])),
        ("memory of the frozen weights", human_bytes(record["weights"])),
        ("kept for the gradient, per token of a pass", human_bytes(record["kept_per_token"])),
        *((f"memory with {tokens:,} tokens in a pass", human_bytes(size)) for tokens, size in record["memory_by_tokens"].items()),
        *(
            (f"tokens in a pass on {card} GiB", f"{tokens:,}" if tokens else "does not fit")
            for card, tokens in record["tokens_by_gib"].items()
        ),
    ):
        table.add_row(name, Text(value, justify="right"))
    parts = Table("can train", title="What a client sends of it in a round", title_justify="left")
    for column in ("parameters", "float32", "bfloat16"):
        parts.add_column(column, justify="right")
    parts.add_column("planned")
    for row in record["parts"]:
        count = row["parameters"]
        parts.add_row(row["name"], f"{count:,}", human_bytes(4 * count), human_bytes(2 * count), "trains" if row["trains"] else "")
    return Group(Text(record["model"], style="bold"), table, parts)


def plan_line(record: Record) -> str:
    """A model's plan in a line, to be told before training."""
    return (
        f"plan  {record['parameters']:,} parameters, {record['trainable']:,} trained: {human_bytes(record['sent_per_client_and_round'])} to send; "
        f"memory {human_bytes(record['memory_without_tokens'])} and {human_bytes(record['kept_per_token'])} per token of a pass"
    )


def _method_traits(row: Record) -> list[str]:
    """A method's kind and properties, what it sends and keeps, and how many clients it needs."""
    traits = [row["kind"], *(WORDS[key] for key, value in row.items() if value is True), f"up {row['up']}", f"down {row['down']}"]
    traits += [f"each client keeps {size:g} ({name})" for name, size in row["client_state"].items()]
    return [*traits, *([f"{row['smallest_cohort']} clients per round or more"] if row["smallest_cohort"] > 1 else [])]


def _strategy_traits(row: Record) -> list[str]:
    """What a strategy changes, and whether FedMLLM(method) brings it."""
    published = ["part of FedMLLM(method)"] if row["published"] else []
    return [row["kind"], *(WORDS[change] for change in row["changes"]), *published]
