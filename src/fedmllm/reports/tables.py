"""Rows of a run report's tables: scores, clients, costs and times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from fedmllm.evaluation.metrics import error_over_models, over_models
from fedmllm.format import duration, human_bytes
from fedmllm.reports.drawing import LOOKS, MODELS
from fedmllm.run.reader import Line, Round, Run
from fedmllm.run.results import SOLO, worst_decile
from fedmllm.types import Metrics

ALWAYS = ("zero_shot", "local_mean", "federated", "centralized", "ceiling")
"""Rows that the table of scores shows even without a number."""
SOLO_TIMES = {"local-": "local, all clients", "calibrated_local-": "calibrated local, all clients", "fine_tuned-": "fine-tuned clients"}
"""Names under which the times of stages with these prefixes are summed."""


@dataclass(frozen=True)
class ScoreRow:
    """A row of the table of scores. None stands for a number that was not requested or does not exist.

    Attributes:
        stage: key of ``LOOKS``, ``majority`` or ``question_only``.
        name: the name in the table.
        score, error: the score and its standard error.
        details: failures, number of samples, and scores by part of the test split.
        note: a remark next to the score.
    """

    stage: str
    name: str
    score: float | None
    error: float | None
    details: Metrics
    note: str = ""


@dataclass(frozen=True)
class ClientRow:
    """Accuracy of one kind of model over the clients, on test samples of each client's own kind.

    Attributes:
        model: key of ``MODELS``.
        name: the name in the table.
        num_clients: number of clients scored.
        mean, worst_decile: mean over the clients and over the worst tenth of them.
        spread: standard deviation over the clients; None for a single client.
        lowest, highest: the lowest and the highest accuracy.
        lowest_at: the client with the lowest accuracy.
    """

    model: str
    name: str
    num_clients: int
    mean: float
    worst_decile: float
    spread: float | None
    lowest: float
    highest: float
    lowest_at: str


@dataclass(frozen=True)
class CostRow:
    """A cost of the federated rounds, as text. ``total`` is empty if a sum would be meaningless."""

    name: str
    per_round: str
    largest: str
    total: str


def score_rows(run: Run) -> list[ScoreRow]:
    """Return the rows of the table of scores, from the result or, in an unfinished run, from the last evaluations."""
    last = {line.stage: line for line in run.lines if line.score is not None}
    details: dict[str, Metrics] = {stage: line.scores or {} for stage, line in last.items()}
    details |= {key: over_models([row for stage, row in details.items() if stage.startswith(prefix)]) for key, prefix in SOLO.items()} | (
        run.result.details if run.result else {}
    )
    scores = dict(run.result.scores) if run.result else {stage: line.score for stage, line in last.items()}
    errors = dict(run.result.standard_errors) if run.result else {stage: details[stage].get("standard_error") for stage in last}
    if tuned := solo_scores(run)["fine_tuned_mean"]:
        scores["fine_tuned_mean"], errors["fine_tuned_mean"] = mean(tuned.values()), error_over_models(tuned.values())
    notes = _notes(run, last)
    rows = [
        ScoreRow(stage, look.name, scores.get(stage), errors.get(stage), details.get(stage, {}), notes.get(stage, ""))
        for stage, look in LOOKS.items()
        if stage in ALWAYS or scores.get(stage) is not None
    ]
    if run.result is None:
        return rows
    rows.append(_majority_row(run.manifest.metric, run.result.majority))
    if run.result.question_only is not None:
        note = "the most frequent training answer to the same question, regardless of the content"
        rows.append(ScoreRow("question_only", "question only", run.result.question_only, None, {}, note))
    return rows


def solo_scores(run: Run) -> dict[str, dict[str, float]]:
    """Return test scores of the models that a single client trained, by key of ``SOLO`` and client; empty for an unfinished run."""
    if run.result is None:
        return {key: {} for key in SOLO}
    last = {line.stage: line.score for line in run.lines if line.score is not None}
    found = {key: {s.removeprefix(prefix): score for s, score in last.items() if s.startswith(prefix)} for key, prefix in SOLO.items()}
    return found | {"local_mean": run.result.local}


def _majority_row(metric: str, score: float | None) -> ScoreRow:
    if metric == "auc":
        return ScoreRow("majority", "chance", score, None, {})
    note = (
        "the most frequent training answer of the same kind (open, closed)"
        if score is not None
        else "unknown, because sites do not report their training answers"
    )
    return ScoreRow("majority", "majority answer", score, None, {}, note)


def _notes(run: Run, last: dict[str, Line]) -> dict[str, str]:
    """Return the notes of the table of scores, by stage."""
    notes = {"ceiling": "population optimum"} if run.result and run.result.scores.get("ceiling") is not None else {}
    if run.result is None and "federated" in last:
        notes["federated"] = f"after round {last['federated'].round}"
    if run.result and run.result.personalized:
        notes["federated"] = "mean of the clients' personalized models"
    for key, scores in solo_scores(run).items():
        if len(scores) > 1:
            worst = _lowest(scores)
            notes[key] = f"{len(scores)} clients: standard deviation {stdev(scores.values()):.3f}, worst {scores[worst]:.3f} ({worst})"
    return notes


def _lowest(scores: dict[str, float]) -> str:
    """Return the client with the lowest score; of several, the first by name."""
    return min(scores, key=lambda client: (scores[client], client))


def client_rows(run: Run) -> list[ClientRow]:
    """Return a row per kind of model scored at clients; empty without ``evaluation.client_samples``."""
    clients = run.result.clients if run.result else {}
    return [_client_row(model, clients[model]) for model in MODELS if clients.get(model)]


def _client_row(model: str, scores: dict[str, float]) -> ClientRow:
    values = list(scores.values())
    spread = stdev(values) if len(values) > 1 else None
    ends = min(values), max(values), _lowest(scores)
    return ClientRow(model, MODELS[model].name, len(values), mean(values), worst_decile(values), spread, *ends)


def cost_rows(rounds: Sequence[Round]) -> list[CostRow]:
    """Return what the rounds cost the network and the server. Rows without data, such as staleness in synchronous runs, are omitted."""
    if not rounds:
        return []
    held = [float(line.bytes_held) for line in rounds]
    stale = [float(steps) for line in rounds for steps in line.staleness.values()]
    return [
        _cost_row("sent by the clients (up)", [line.bytes_up for line in rounds], human_bytes),
        _cost_row("received by the clients (down)", [line.bytes_down for line in rounds], human_bytes),
        _cost_row("server time to receive and aggregate", [line.seconds.get("aggregate", 0.0) for line in rounds], duration),
        *([_cost_row("memory of the aggregation", held, human_bytes, summed=False)] if any(held) else []),
        *([_cost_row("staleness of an update, in server steps", stale, "{:.2g}".format, summed=False)] if stale else []),
    ]


def _cost_row(name: str, values: Sequence[float], wording: Callable[[float], str], summed: bool = True) -> CostRow:
    return CostRow(name, wording(mean(values)), wording(max(values)), wording(sum(values)) if summed else "")


@dataclass(frozen=True)
class PartRow:
    """A trainable part of the model, and the bytes that a client sends per round if it trains.

    Attributes:
        name: the name in the table.
        parameters: number of parameters.
        float32, bfloat16: their size in these formats, as text.
        trained: whether this run trained the part.
    """

    name: str
    parameters: int
    float32: str
    bfloat16: str
    trained: bool


def part_rows(run: Run) -> list[PartRow]:
    """Return a row per trainable part of the model; empty for an unfinished run."""
    parts, trained = (run.result.parts, run.result.trained) if run.result else ({}, [])
    return [PartRow(name, count, human_bytes(4 * count), human_bytes(2 * count), name in trained) for name, count in parts.items() if count]


def stage_seconds(run: Run) -> dict[str, float]:
    """Return wall time in seconds by stage, with stages of single clients summed."""
    seconds: dict[str, float] = {}
    parts = [(line.stage, sum(line.seconds.values())) for line in run.lines]
    for stage, part in run.result.seconds_by_stage.items() if run.result else parts:
        solo = next((name for prefix, name in SOLO_TIMES.items() if stage.startswith(prefix)), stage)
        name = LOOKS[stage].name if stage in LOOKS else solo
        seconds[name] = seconds.get(name, 0.0) + part
    return seconds
