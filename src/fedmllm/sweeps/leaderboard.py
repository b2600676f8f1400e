"""``leaderboard.json``: a finished sweep as others may compare it, written only where its files bear it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fedmllm.config import Experiment, differences
from fedmllm.data.federated import manifest, spread
from fedmllm.errors import FedMLLMError, RunError, listing
from fedmllm.evaluation.predictions import Answered, answered
from fedmllm.files import write_json
from fedmllm.run.resident import Resident
from fedmllm.sweeps.comparison import Trained, read_cell
from fedmllm.sweeps.grid import Cell, code_version
from fedmllm.sweeps.runner import Places
from fedmllm.types import Prediction

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_SHA256 = r"^[0-9a-f]{64}$"
TOLERANCE = 1e-9
"""Between a score as written and as computed from the answers again."""


class Entry(BaseModel):
    """A cell."""

    model_config = _STRICT

    model: str
    dataset: str
    scenario: str
    method: str
    seed: int
    """The grid's names."""
    metric: Literal["auc", "macro_f1", "accuracy", "mixed"]
    """Of ``score``."""
    score: float = Field(ge=0, le=1)
    """Of the federated model after the last round."""
    standard_error: float | None = Field(ge=0)
    """Over test samples; of a personalized method over the clients."""
    num_samples: int = Field(gt=0)
    """Test samples asked."""
    failures: int = Field(ge=0)
    """Answers that could not be read."""
    num_rounds: int = Field(ge=0)
    """Trained."""
    bytes_up: int = Field(ge=0)
    """Sent by all clients."""
    bytes_down: int = Field(ge=0)
    """Received by all clients."""
    settings: str = Field(pattern=_SHA256)
    """SHA-256 of ``config.yaml``."""
    split: str = Field(pattern=_SHA256)
    """SHA-256 of ``manifest.json``: two entries with the same were trained and tested on the same samples."""
    answers: str = Field(pattern=_SHA256)
    """SHA-256 of ``predictions.json``."""


class Leaderboard(BaseModel):
    """The file. Its JSON schema is ``Leaderboard.model_json_schema()``."""

    model_config = _STRICT

    version: Literal[1] = 1
    """Of this form."""
    code: str
    """The version of the code on which scores depend."""
    versions: dict[str, str]
    """Of the package, Python and the libraries."""
    entries: list[Entry]
    """The cells, in the grid's order."""


def submit(cells: Sequence[Cell], output: Path) -> Path:
    """Check a sweep, and write ``leaderboard.json`` beside its cells.

    Of every cell of the grid: it is finished, by this version of the code, with the grid's settings; the split is the one that the settings
    give, and the answers are to its test samples; all rounds are there; the scores, bytes and failures of the result are those of
    the rounds and the answers.

    Returns:
        where the file is.

    Raises:
        RunError: naming every cell that does not stand, and why; nothing is written then.
    """
    held, found, problems = Resident(), [], []
    for cell in cells:
        places = Places.of(output, cell)
        try:
            trained = _finished(places)
            wrong = list(_wrong(cell, places.folder, trained, held))
            found.append((cell, places.folder, trained))
        except FedMLLMError as error:
            wrong = [" ".join(str(error).split())]
        problems += [f"{' / '.join(map(str, cell.labels.values()))}: {problem}" for problem in wrong]
    if problems:
        raise RunError(f"{output}: {len(problems)} thing(s) do not stand, so there is no leaderboard.json:\n{listing(problems)}")
    entries = [_entry(cell, folder, trained) for cell, folder, trained in found]
    board = Leaderboard(code=code_version(), versions=found[0][2].result.versions, entries=entries)
    write_json(output / "leaderboard.json", board.model_dump())
    return output / "leaderboard.json"


def _finished(places: Places) -> Trained:
    if not places.finished:
        raise RunError(
            f"not finished by this version of the code ({code_version()}); run fedmllm sweep again, or check out the version that trained it"
        )
    return read_cell(places.names)


def read_leaderboard(path: Path) -> Leaderboard:
    """Another's file.

    Raises:
        RunError: if it is not of this form.
    """
    try:
        return Leaderboard.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: no leaderboard of this version of fedmllm: {' '.join(str(error).split())[:400]}") from error


def _wrong(cell: Cell, folder: Path, trained: Trained, held: Resident) -> Iterator[str]:
    """What of a cell does not stand."""
    for changed in differences(Experiment.load(folder / "config.yaml"), cell.experiment):
        yield f"config.yaml has other settings than the grid (there and here): {changed}"
    data = spread(held.dataset(cell.experiment), cell.experiment.federation, cell.seed)
    if json.loads((folder / "manifest.json").read_text(encoding="utf-8")) != manifest(data, cell.scenario, cell.seed):
        yield "manifest.json is not the split that the settings give"
    asked = answered(data.dataset.metric, [Prediction(sample, None) for sample in data.dataset.test])
    if not all(_same_questions(asked, model) for model in trained.answers):
        yield "predictions.json does not answer the test samples"
    else:
        yield from _wrong_numbers(trained)


def _same_questions(asked: Answered, model: Answered) -> bool:
    same = (asked.metric, asked.metrics) == (model.metric, model.metrics)
    return same and np.array_equal(asked.truth, model.truth) and np.array_equal(asked.domain, model.domain)


def _wrong_numbers(trained: Trained) -> Iterator[str]:
    """Where a result says something else than what it is made of."""
    result, rounds = trained.result, trained.run.rounds
    if [line.round for line in rounds] != list(range(1, result.num_rounds + 1)):
        yield f"metrics.jsonl has not the rounds 1 to {result.num_rounds}"
    computed = {
        "score": mean(model.score() for model in trained.answers),
        "bytes_up": sum(line.bytes_up for line in rounds),
        "bytes_down": sum(line.bytes_down for line in rounds),
        "failures": sum(int((~np.isfinite(model.guess) | (model.guess < 0)).sum()) for model in trained.answers),
    }
    told = {"score": trained.score, "bytes_up": result.bytes_up, "bytes_down": result.bytes_down}
    # Of free answers a failure is as wrong as any other, and the answers do not tell them apart.
    if result.metric not in ("accuracy", "mixed"):
        told["failures"] = result.details["federated"]["failures"]
    for name, value in told.items():
        if abs(value - computed[name]) > TOLERANCE:
            yield f"result.json: {name} is {value}, its rounds and answers come to {computed[name]}"


def _entry(cell: Cell, folder: Path, trained: Trained) -> Entry:
    result, details = trained.result, trained.result.details["federated"]
    settings, split, answers = (_digest(folder / name) for name in ("config.yaml", "manifest.json", "predictions.json"))
    return Entry(
        model=cell.model,
        dataset=cell.dataset,
        scenario=cell.scenario,
        method=cell.method,
        seed=cell.seed,
        metric=result.metric,
        score=trained.score,
        standard_error=result.standard_errors["federated"],
        num_samples=int(details["num_samples"]),
        failures=int(details["failures"]),
        num_rounds=result.num_rounds,
        bytes_up=result.bytes_up,
        bytes_down=result.bytes_down,
        settings=settings,
        split=split,
        answers=answers,
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
