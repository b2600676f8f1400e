"""Writes a run's report as one self-contained HTML page, without network access, scripts or further files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedmllm.errors import RunError
from fedmllm.evaluation.predictions import SIDE_BY_SIDE
from fedmllm.files import write_atomically
from fedmllm.format import duration, human_bytes
from fedmllm.privacy.statement import UNPROTECTED
from fedmllm.reports import figures
from fedmllm.reports.drawing import LOOKS
from fedmllm.reports.tables import ScoreRow, client_rows, cost_rows, part_rows, score_rows, solo_scores, stage_seconds
from fedmllm.run.reader import Round, Run, read_run

FREE = {"recall_open": "open, token recall", "f1_open": "open, token F1", "rouge_l_long": "long, ROUGE-L"}
"""Names of the scores of free answers other than exact match, by key of ``ScoreRow.details``."""
METRICS = {"auc": "AUC", "macro_f1": "macro-F1", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "mixed": "mean score"}
STEPS = ("train", "aggregate", "evaluate", "checkpoint")
MAX_REFUSED = 50
"""Maximum number of refused updates in the list; further ones are only counted."""


def write_report(run: Path) -> Path:
    """Write a run's ``report.html``, atomically replacing an older one. The same files give the same bytes.

    Args:
        run: a run folder. Without a ``result.json`` the report shows the run so far.

    Returns:
        The path of the report.

    Raises:
        RunError: if a file is missing or broken, or the report cannot be written. An older report then stays unchanged.
    """
    path = Path(run) / "report.html"
    page = render(read_run(Path(run)))
    try:
        write_atomically(path, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}); free disk space, or make the folder writable") from error
    return path


def render(run: Run) -> str:
    """Return the report's HTML."""
    return page("report.html.j2", _context(run))


def page(template: str, values: Mapping[str, Any]) -> str:
    """Render a template with its values, with filters that format numbers."""
    environment = Environment(
        loader=PackageLoader("fedmllm", "reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update({filter_.__name__: _unbroken(filter_) for filter_ in (human_bytes, duration)})
    environment.filters["unbroken"] = _unbroken(str)
    return environment.get_template(template).render(values) + "\n"


def _unbroken(wording: Callable[[Any], str]) -> Callable[[Any], str]:
    """Return a formatter whose spaces do not break, so that numbers stay on one line with their units."""
    return lambda value: wording(value).replace(" ", "\u00a0")


def _context(run: Run) -> dict[str, Any]:
    """Return all values that the template shows."""
    rows, rounds, clients = score_rows(run), run.rounds, run.manifest.clients
    refused = [(line.stage, line.round, refusal) for line in run.lines if isinstance(line, Round) for refusal in line.refused]
    return {
        "title": run.result.experiment if run.result else run.name,
        "config": run.config,
        "manifest": run.manifest,
        "result": run.result,
        "unprotected": UNPROTECTED,
        "audit": run.audit,
        "rounds": rounds,
        "watched": next((row for row in reversed(rounds) if row.watched is not None), None),
        "clients": clients,
        "metric": _metric(run),
        "rows": rows,
        "by_stage": {row.stage: row for row in rows},
        "kinds": [*_beside(run, rows), *((key, FREE.get(key, key.partition("_")[2])) for key in _partial_scores(rows))],
        "own_kind": client_rows(run),
        "costs": cost_rows(rounds),
        "parts": part_rows(run),
        "sizes": sorted(client.num_samples for client in clients if client.num_samples is not None) or [0],
        "median": median,
        "modalities": _modalities(run),
        "running": list(accumulate(line.bytes_up + line.bytes_down for line in rounds)),
        "seconds": run.result.seconds if run.result else sum(stage_seconds(run).values()),
        "refused": refused[:MAX_REFUSED],
        "num_refused": len(refused),
        "skipped": [line.round for line in rounds if line.skipped],
        "unsummed": [
            (line.round, line.secure_aggregation.failed) for line in rounds if line.secure_aggregation and line.secure_aggregation.failed
        ],
        "halved": [line.round for line in rounds if line.halvings],
        **_figures(run, {row.stage: row for row in rows}),
    }


def _beside(run: Run, rows: Sequence[ScoreRow]) -> list[tuple[str, str]]:
    """Return (key, name) of the metrics to show next to the headline metric."""
    return [(key, METRICS[key]) for key in SIDE_BY_SIDE if key != run.manifest.metric and any(key in row.details for row in rows)]


def _partial_scores(rows: Sequence[ScoreRow]) -> list[str]:
    """Return the keys of scores by answer type or by dataset of a mixture. Scores of open answers come first."""
    keys = {key for row in rows for key in row.details if key.startswith(("accuracy_", "score_")) or key in FREE}
    return sorted(keys, key=lambda key: (key != "accuracy_open", key not in FREE, key))


def _metric(run: Run) -> str:
    return METRICS.get(run.manifest.metric, run.manifest.metric)


def _figures(run: Run, rows: Mapping[str, ScoreRow]) -> dict[str, Markup | None]:
    """Return the figures by name; None for a figure without data."""
    rounds, clients, metric = run.rounds, run.manifest.clients, _metric(run)
    scores, errors = {stage: row.score for stage, row in rows.items()}, {stage: row.error for stage, row in rows.items()}
    solo = {key: list(by_client.values()) for key, by_client in solo_scores(run).items()}
    own_kind = run.result.clients if run.result else {}
    majority = rows.get("majority")
    baseline = (majority.name, majority.score) if majority and majority.score is not None else None
    steps = {step: sum(line.seconds.get(step, 0.0) for line in rounds) for step in STEPS}
    scored = any(scores.get(stage) is not None for stage in LOOKS)
    return {
        "scores_figure": figures.final_scores(scores, errors, solo, baseline, metric) if scored else None,
        "own_kind_figure": figures.client_scores(own_kind) if any(own_kind.values()) else None,
        "curve_figure": figures.learning_curve(rounds, scores, metric) if rounds else None,
        "clients_figure": figures.client_samples(clients) if clients else None,
        "traffic_figure": figures.traffic(rounds) if rounds else None,
        "times_figure": figures.times(steps, stage_seconds(run)) if rounds else None,
    }


def _modalities(run: Run) -> list[tuple[str, int, int]]:
    """Return (modalities, number of training samples, number of test samples) for every set of modalities that occurs."""
    train: Counter[str] = Counter()
    for client in run.manifest.clients:
        train.update(client.modalities)
    test = run.manifest.test.modalities
    return [(name or "none", train[name], test.get(name, 0)) for name in sorted({*train, *test})]
