"""Reads a run folder and validates every file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from fedmllm.errors import RunError, listing
from fedmllm.run.audit_result import AuditResult
from fedmllm.run.results import CHECKED, RunResult
from fedmllm.types import Metrics


class _Checked(BaseModel):
    model_config = CHECKED


class Counts(_Checked):
    """Sample counts: total, by label, and by modalities (``image+text``)."""

    num_samples: int
    labels: dict[str, int]
    modalities: dict[str, int]


class Client(_Checked):
    """One client of the manifest. A remote client may withhold its number of samples."""

    id: str
    num_samples: int | None
    labels: dict[str, int]
    modalities: dict[str, int]


class Manifest(_Checked):
    """The fields of ``manifest.json`` that a report needs."""

    dataset: str
    scenario: str
    seed: int
    metric: str
    notes: list[str]
    dropped: int
    clients: list[Client]
    test: Counts
    validation: Counts | None = None


class Line(_Checked):
    """A line of ``metrics.jsonl``: scores on the test and validation splits, and seconds. Zero-shot is round 0 and has only these fields."""

    stage: str
    round: int
    score: float | None
    scores: Metrics | None
    seconds: dict[str, float]
    validation: Metrics | None = None

    @property
    def watched(self) -> float | None:
        """The score for learning curves, from the validation split. Runs of earlier versions scored every round on the test split instead."""
        return self.score if self.validation is None else self.validation["score"]


class Refusal(_Checked):
    """A client's update that the server refused, or its failure."""

    client: str
    reason: str


class Session(_Checked):
    """A round's session of secure aggregation."""

    clients: int
    failed: str | None


class Round(Line):
    """A line of ``metrics.jsonl`` for a round with training."""

    clients: list[str]
    num_samples: int
    learning_rate: float
    loss: float | None
    bytes_up: int
    bytes_down: int
    bytes_held: int = 0
    skipped: bool = False
    halvings: dict[str, int] = Field(default_factory=dict)
    withheld: list[str] = Field(default_factory=list)
    staleness: dict[str, int] = Field(default_factory=dict)
    secure_aggregation: Session | None = None
    refused: list[Refusal]


@dataclass(frozen=True)
class Run:
    """The content of a run folder.

    Attributes:
        name: the folder's name.
        config: the experiment's settings, as text.
        manifest: the samples of each client.
        lines: finished rounds of all stages, in the order in which they ended.
        result: the result; None while the run is unfinished.
        audit: the result of the run's audit; None without one.
    """

    name: str
    config: str
    manifest: Manifest
    lines: tuple[Line, ...]
    result: RunResult | None
    audit: AuditResult | None = None

    @property
    def rounds(self) -> list[Round]:
        """The rounds of the federated stage."""
        return [line for line in self.lines if isinstance(line, Round) and line.stage == "federated"]


def read_run(folder: Path) -> Run:
    """Read all files of a run folder. Only ``result.json`` and ``audit/audit.json`` may be missing.

    Raises:
        RunError: naming the file, its problem and the remedy.
    """
    config, manifest = _text(folder / "config.yaml"), _parse(folder / "manifest.json", _text(folder / "manifest.json"), Manifest)
    lines, path = tuple(_lines(folder / "metrics.jsonl")), folder / "result.json"
    result = _parse(path, _text(path), RunResult) if path.exists() else None
    audit = folder / "audit" / "audit.json"
    return Run(folder.resolve().name, config, manifest, lines, result, read_audit(audit) if audit.exists() else None)


def read_audit(path: Path) -> AuditResult:
    """Read an ``audit.json``.

    Raises:
        RunError: naming the file, its problem and the remedy.
    """
    return _parse(path, _text(path), AuditResult)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RunError(f"{path}: cannot be read ({reason}); name a complete folder that fedmllm train wrote") from error


def _lines(path: Path) -> Iterator[Line]:
    """Yield the lines of the metrics file. A last line without a line break is the result of a crash and is ignored, as when a run resumes."""
    for number, text in enumerate(_text(path).split("\n")[:-1], start=1):
        where = f"{path}, line {number}"
        line = _parse(where, text, Line)
        yield line if line.round == 0 else _parse(where, text, Round)


Shape = TypeVar("Shape")


def _parse(where: object, text: str, shape: type[Shape]) -> Shape:
    try:
        return TypeAdapter(shape).validate_json(text)
    except ValidationError as error:
        rows = [f"{'.'.join(map(str, row['loc'])) or 'the content'}: {row['msg']}" for row in error.errors(include_url=False)]
        remedy = "finish the run with fedmllm train ... --resume, or run the experiment again"
        raise RunError(f"{where}: does not match the format of this version of fedmllm:\n{listing(rows)}\n{remedy}") from error
