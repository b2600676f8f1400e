"""A run folder as one HTML page that needs nothing else: no network, no scripts, no second file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedmllm.benchmark import figures
from fedmllm.benchmark.drawing import LOOKS, duration, human_bytes
from fedmllm.benchmark.folder import Line, Round, Run, read_run
from fedmllm.engine.checkpoint import write_atomically
from fedmllm.errors import RunError
from fedmllm.types import Metrics

METRICS = {"auc": "AUC", "macro_f1": "macro F1", "accuracy": "accuracy", "mixed": "mean score"}
STEPS = ("train", "aggregate", "evaluate", "checkpoint")
MAX_REFUSED = 50
"""Refused updates listed; more are only counted."""


@dataclass(frozen=True)
class ScoreRow:
    """A line of the table of scores. None is a number that was not asked for, or does not exist.

    Attributes:
        stage: key of ``LOOKS``, or ``majority``.
        name: as printed.
        score, error: the score and its standard error.
        details: failures, samples asked and partial scores.
        note: what else there is to say.
    """

    stage: str
    name: str
    score: float | None
    error: float | None
    details: Metrics
    note: str = ""


def write_report(run: Path) -> Path:
    """Write a run's ``report.html``, replacing an older one at once. The same files give the same bytes.

    Args:
        run: a run folder. Without a ``result.json`` the report shows what there is so far.

    Returns:
        Where the report is.

    Raises:
        RunError: if a file is missing or broken, or the report cannot be written; an older report stays as it was.
    """
    path = Path(run) / "report.html"
    page = render(read_run(Path(run)))
    try:
        write_atomically(path, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); make room, or allow writing there") from error
    return path


def render(run: Run) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("fedmllm", "benchmark"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update({filter_.__name__: _unbroken(filter_) for filter_ in (human_bytes, duration)})
    return environment.get_template("report.html.j2").render(_context(run)) + "\n"


def _unbroken(wording: Callable[[float], str]) -> Callable[[float], str]:
    """Numbers stay on one line with their units."""
    return lambda value: wording(value).replace(" ", "\u00a0")


def _context(run: Run) -> dict[str, Any]:
    """Everything the template shows."""
    rows, rounds, clients = score_rows(run), run.rounds, run.manifest.clients
    refused = [(line.stage, line.round, refusal) for line in run.lines if isinstance(line, Round) for refusal in line.refused]
    return {
        "title": run.result.experiment if run.result else run.name,
        "config": run.config,
        "manifest": run.manifest,
        "result": run.result,
        "rounds": rounds,
        "clients": clients,
        "metric": _metric(run),
        "rows": rows,
        "by_stage": {row.stage: row for row in rows},
        "kinds": [(key, key.partition("_")[2]) for key in _partial_scores(rows)],
        "sizes": sorted(client.num_samples for client in clients) or [0],
        "median": median,
        "modalities": _modalities(run),
        "running": list(accumulate(line.bytes_up + line.bytes_down for line in rounds)),
        "seconds": run.result.seconds if run.result else sum(stage_seconds(run).values()),
        "refused": refused[:MAX_REFUSED],
        "num_refused": len(refused),
        **_figures(run, {row.stage: row for row in rows}),
    }


def _partial_scores(rows: Sequence[ScoreRow]) -> list[str]:
    """Keys of scores over a part of the test split: by kind of answer, or by dataset of a mixture."""
    keys = {key for row in rows for key in row.details if key.startswith(("accuracy_", "score_"))}
    return sorted(keys, key=lambda key: (not key.startswith("accuracy_open"), key))


def _metric(run: Run) -> str:
    return METRICS.get(run.manifest.metric, run.manifest.metric)


def _figures(run: Run, rows: Mapping[str, ScoreRow]) -> dict[str, Markup | None]:
    """The figures by name; None for those without anything to show yet."""
    rounds, clients, metric = run.rounds, run.manifest.clients, _metric(run)
    scores, errors = {stage: row.score for stage, row in rows.items()}, {stage: row.error for stage, row in rows.items()}
    local = list(run.result.local.values()) if run.result else []
    majority = rows.get("majority")
    baseline = (majority.name, majority.score) if majority and majority.score is not None else None
    steps = {step: sum(line.seconds.get(step, 0.0) for line in rounds) for step in STEPS}
    scored = any(scores[stage] is not None for stage in LOOKS)
    return {
        "scores_figure": figures.final_scores(scores, errors, local, baseline, metric) if scored else None,
        "curve_figure": figures.learning_curve(rounds, scores, metric) if rounds else None,
        "clients_figure": figures.client_samples(clients) if clients else None,
        "traffic_figure": figures.traffic(rounds) if rounds else None,
        "times_figure": figures.times(steps, stage_seconds(run)) if rounds else None,
    }


def score_rows(run: Run) -> list[ScoreRow]:
    """The scores, from the result or, while there is none, from the last evaluations."""
    last = {line.stage: line for line in run.lines if line.score is not None}
    details: dict[str, Metrics] = {stage: line.scores or {} for stage, line in last.items()}
    details |= {"local_mean": _local_details(details)} | (run.result.details if run.result else {})
    scores = run.result.scores if run.result else {stage: line.score for stage, line in last.items()}
    errors = run.result.standard_errors if run.result else {stage: details[stage].get("standard_error") for stage in last}
    notes = _notes(run, last)
    rows = [
        ScoreRow(stage, look.name, scores.get(stage), errors.get(stage), details.get(stage, {}), notes.get(stage, ""))
        for stage, look in LOOKS.items()
    ]
    return [*rows, _majority_row(run.manifest.metric, run.result.majority)] if run.result else rows


def _majority_row(metric: str, score: float | None) -> ScoreRow:
    if metric == "auc":
        return ScoreRow("majority", "chance", score, None, {})
    return ScoreRow("majority", "majority answer", score, None, {}, "the most frequent training answer, always")


def _notes(run: Run, last: dict[str, Line]) -> dict[str, str]:
    """What the table says beside a score."""
    notes = {"ceiling": "population optimum"} if run.result and run.result.scores.get("ceiling") is not None else {}
    if run.result is None and "federated" in last:
        notes["federated"] = f"after round {last['federated'].round}"
    if run.result and len(local := run.result.local) > 1:
        worst = min(local, key=lambda client: (local[client], client))
        notes["local_mean"] = f"{len(local)} clients: standard deviation {stdev(local.values()):.3f}, worst {local[worst]:.3f} ({worst})"
    return notes


def _local_details(details: dict[str, Metrics]) -> Metrics:
    """Of all clients that trained alone: failures and questions summed up, partial scores averaged."""
    rows = [row for stage, row in details.items() if stage.startswith("local-")]
    shared = set.intersection(*map(set, rows)) if rows else set()
    return {key: (sum if key in ("failures", "num_samples") else mean)(row[key] for row in rows) for key in sorted(shared)}


def stage_seconds(run: Run) -> dict[str, float]:
    """Wall time by stage, the clients that trained alone taken together."""
    seconds: dict[str, float] = {}
    parts = [(line.stage, sum(line.seconds.values())) for line in run.lines]
    for stage, part in run.result.seconds_by_stage.items() if run.result else parts:
        name = LOOKS[stage].name if stage in LOOKS else "local, all clients" if stage.startswith("local") else stage
        seconds[name] = seconds.get(name, 0.0) + part
    return seconds


def _modalities(run: Run) -> list[tuple[str, int, int]]:
    """(modalities, training samples, test samples) for every set of modalities that occurs."""
    train: Counter[str] = Counter()
    for client in run.manifest.clients:
        train.update(client.modalities)
    test = run.manifest.test.modalities
    return [(name or "none", train[name], test.get(name, 0)) for name in sorted({*train, *test})]
