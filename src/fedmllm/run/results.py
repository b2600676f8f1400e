"""What a finished run says: ``result.json``."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import ClassVar

from pydantic import ConfigDict

from fedmllm import __version__
from fedmllm.evaluation.predictions import SIDE_BY_SIDE
from fedmllm.types import Metrics, Record

CHECKED = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)
"""How strictly a run's files are read back: no number for a text, no NaN."""

SCORES = ("zero_shot", "local_mean", "calibrated_local_mean", "federated", "centralized", "calibrated_centralized", "ceiling")
SOLO = {"local_mean": "local-", "calibrated_local_mean": "calibrated_local-", "fine_tuned_mean": "fine_tuned-"}
"""How the stages of one client each begin, by the name under which they are taken together."""


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run, as written to ``result.json``.

    Attributes:
        experiment: its name, from the file's.
        metric: what ``scores`` measure.
        scores: by ``SCORES``, each in [0, 1]; None where not asked for or not known.
        standard_errors: of the same, over the test samples; for means over clients, and a personalized method's ``federated``, over the clients.
        details: all metrics by stage, the clients' taken together as in ``scores``; whatever the headline is, ``accuracy`` and, of
            classifications, ``balanced_accuracy`` and ``macro_f1``.
        local: each client's score when it trains alone.
        majority: score of always giving the most frequent training answer of the same kind (open, closed); None if not known.
        question_only: score of giving the most frequent training answer to the same question; None if not known, or if it tells nothing.
        bytes_up, bytes_down: what all clients of the federated stage sent and received.
        seconds: wall time of training and evaluation, over all sittings.
        seconds_by_stage: the same by stage.
        validation: all metrics of the federated model on the validation part; empty if it was not asked (``evaluation.every``).
        tested: all metrics of the federated model by copy of the test split (``evaluation.tested``).
        clients: accuracy by model (``federated``, ``local``, ``fine_tuned``) and client on test samples of the client's own kind
            (``evaluation.client_samples``).
        parts: parameters of everything of the model that could train, by its name.
        trained: the names of those that did.
        personalized: whether each client ended with a model of its own, whose mean is the score ``federated``.
        remarks: by strategy, what it does otherwise than its description has it, and why.
        idle: of these, the strategies that changed nothing.
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

    @property
    def below(self) -> list[str]:
        """Which answers that look at neither picture nor text the federated model does not beat, in words."""
        chance = "chance" if self.metric == "auc" else "the majority answer"
        levels = {chance: self.majority, "the most frequent answer to each question": self.question_only}
        reached = self.scores["federated"]
        return [name for name, level in levels.items() if None not in (level, reached) and reached <= level]  # type: ignore[operator]

    @property
    def beside(self) -> tuple[str, ...]:
        """What stands beside the headline: those of ``SIDE_BY_SIDE`` that are known of the federated model."""
        return tuple(name for name in SIDE_BY_SIDE if name != self.metric and name in self.details.get("federated", {}))

    def to_record(self) -> Record:
        """The JSON object."""
        return asdict(self)


def worst_decile(scores: Iterable[float]) -> float:
    """How the clients fare for whom a model works least: ``mean of the ceil(K / 10) lowest of K scores``.

    With ten clients or fewer it is the lowest score.

    Args:
        scores: one per client, at least one.
    """
    ranked = sorted(scores)
    lowest = ranked[: math.ceil(len(ranked) / 10)]
    return sum(lowest) / len(lowest)


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    names = ("torch", "transformers", "peft", "numpy", "scikit-learn", "pillow")
    return {"fedmllm": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
