"""The result of a finished run, ``result.json``."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from fedmllm import __version__
from fedmllm.errors import RunError
from fedmllm.evaluation.predictions import SIDE_BY_SIDE
from fedmllm.privacy.statement import PrivacyStatement, SecureStatement
from fedmllm.types import Metrics, Record

CHECKED = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)
"""Validation of a run's files on reading: strict types, no NaN."""

SCORES = ("zero_shot", "local_mean", "calibrated_local_mean", "federated", "centralized", "calibrated_centralized", "ceiling")
SOLO = {"local_mean": "local-", "calibrated_local_mean": "calibrated_local-", "fine_tuned_mean": "fine_tuned-"}
"""Name prefix of the stages with a single client, by the name of their mean."""


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run, as written to ``result.json``.

    Attributes:
        experiment: the experiment's name, from its file name.
        metric: the metric of ``scores``.
        scores: scores in [0, 1], by the names in ``SCORES``; None if not requested or unknown.
        standard_errors: standard errors of ``scores`` over the test samples. For means over clients, and for ``federated`` with a personalized
            method, over the clients.
        details: all metrics by stage, averaged over clients as in ``scores``. They always include ``accuracy`` and, for classification,
            ``balanced_accuracy`` and ``macro_f1``.
        local: the score of each client that trains alone, by client.
        majority: score of always giving the most frequent training answer of the same answer type (open, closed); None if unknown.
        question_only: score of giving the most frequent training answer to the same question; None if unknown or not informative.
        bytes_up, bytes_down: bytes that all clients of the federated stage sent and received.
        seconds: wall time of training and evaluation, over all sessions of the run.
        seconds_by_stage: the same, by stage.
        validation: all metrics of the federated model on the validation split; empty if it was not scored (``evaluation.every``).
        tested: all metrics of the federated model, by copy of the test split (``evaluation.tested``).
        clients: accuracy by model (``federated``, ``local``, ``fine_tuned``) and client, on test samples drawn like the client's own
            (``evaluation.client_samples``).
        parts: number of parameters of each trainable part of the model, by name.
        trained: names of the parts that the run trained.
        personalized: whether each client ended with a personalized model; then ``federated`` is the mean of their scores.
        remarks: how a strategy deviated from its description and why, by strategy.
        idle: the strategies among them that changed nothing.
        privacy: the differential privacy of the federated model; None without.
        secure: what secure aggregation hid from the server; None without.
    """

    __pydantic_config__: ClassVar[ConfigDict] = CHECKED

    experiment: str
    metric: str
    scores: dict[str, float | None]
    standard_errors: dict[str, float | None]
    details: dict[str, Metrics]
    local: dict[str, float]
    majority: float | None
    bytes_up: int
    bytes_down: int
    seconds: float
    seconds_by_stage: dict[str, float]
    seed: int
    versions: dict[str, str]
    num_rounds: int
    num_clients: int
    clients_per_round: int
    trainable_parameters: int
    algorithm: str
    strategies: list[str]
    model: str
    tested: dict[str, Metrics] = field(default_factory=dict)
    clients: dict[str, dict[str, float]] = field(default_factory=dict)
    personalized: bool = False
    parts: dict[str, int] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    remarks: dict[str, str] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    validation: Metrics = field(default_factory=dict)
    question_only: float | None = None
    privacy: PrivacyStatement | None = None
    secure: SecureStatement | None = None
    folder: Path | None = field(default=None, compare=False, repr=False)
    """The run folder, for a result that a run of this process returned. It is not part of ``result.json``."""

    def history(self) -> list[dict[str, Any]]:
        """Return one flat row per finished round of each stage, in order. ``pandas.DataFrame`` accepts the list.

        Columns: ``stage``, ``round``, ``score``, ``loss``, ``learning_rate``, ``num_samples``, ``bytes_up``, ``bytes_down``, ``num_refused``, and
        each score on the test split (``test_NAME``) and on the validation split (``validation_NAME``), if the round has it.

        Raises:
            RunError: if the result does not know its folder.
        """
        if self.folder is None:
            raise RunError("this result was read from a file and has no run folder; use the result that fedmllm.train returns")
        from fedmllm.engine.checkpoint import RunStore

        return [_row(record) for record in RunStore(self.folder).records()]

    def plot(self, stage: str = "federated") -> Any:
        """Return a matplotlib ``Axes`` with a stage's score by round, on the validation split or, without one, on the test split.

        Raises:
            RunError: if the result does not know its folder.
        """
        from matplotlib import pyplot

        rows = [row for row in self.history() if row["stage"] == stage]
        # Made with pyplot, as in pandas, so that notebooks show the figure without another call.
        _, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained", subplot_kw={"xlabel": "round", "ylabel": self.metric})
        for name, label in (("validation_score", "validation split"), ("test_score", "test split")):
            points = [(row["round"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=label)
        for name in ("zero_shot", "centralized"):
            if (score := self.scores.get(name)) is not None:
                axes.axhline(score, linestyle="--", color="gray", label=f"{name.replace('_', '-')}, test split")
        axes.locator_params(axis="x", integer=True)
        axes.legend()
        return axes

    @property
    def below(self) -> list[str]:
        """Descriptions of the trivial baselines (``majority``, ``question_only``) that the federated model does not beat."""
        chance = "chance" if self.metric == "auc" else "the majority answer"
        levels = {chance: self.majority, "the most frequent answer to each question": self.question_only}
        reached = self.scores["federated"]
        return [name for name, level in levels.items() if None not in (level, reached) and reached <= level]  # type: ignore[operator]

    @property
    def beside(self) -> tuple[str, ...]:
        """Metrics to show next to the headline metric: those of ``SIDE_BY_SIDE`` that the federated model has."""
        return tuple(name for name in SIDE_BY_SIDE if name != self.metric and name in self.details.get("federated", {}))

    def to_record(self) -> Record:
        """Return the content of ``result.json``."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}


def _row(record: Record) -> dict[str, Any]:
    """Return a line of metrics as a flat row."""
    kept = ("stage", "round", "score", "loss", "learning_rate", "num_samples", "bytes_up", "bytes_down")
    row = {name: record.get(name) for name in kept} | {"num_refused": len(record.get("refused", []))}
    for split, scores in (("test", record.get("scores")), ("validation", record.get("validation"))):
        row |= {f"{split}_{name}": value for name, value in (scores or {}).items()}
    return row


def worst_decile(scores: Iterable[float]) -> float:
    """Return the mean score of the worst tenth of the clients: ``mean of the ceil(K / 10) lowest of K scores``.

    With ten clients or fewer, this is the lowest score.

    Args:
        scores: one score per client, at least one.
    """
    ranked = sorted(scores)
    lowest = ranked[: math.ceil(len(ranked) / 10)]
    return sum(lowest) / len(lowest)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    names = ("torch", "transformers", "peft", "numpy", "scikit-learn", "pillow")
    return {"fedmllm": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
