"""``leaderboard.json``: the results of a finished sweep, for comparison by others. It is written only if the sweep's files confirm it."""

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
from fedmllm.evaluation.predictions import CLASSES, Answered, answered
from fedmllm.files import write_json
from fedmllm.run.resident import Resident
from fedmllm.sweeps.code_version import code_version
from fedmllm.sweeps.grid import Cell
from fedmllm.sweeps.runner import Places
from fedmllm.sweeps.trained import Trained, read_cell
from fedmllm.types import Prediction

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_SHA256 = r"^[0-9a-f]{64}$"
TOLERANCE = 1e-9
"""Largest difference between a recorded score and the same score computed from the answers."""


class Entry(BaseModel):
    """The results of one cell."""

    model_config = _STRICT

    model: str
    dataset: str
    scenario: str
    method: str
    seed: int
    """Seed of the experiment. The names above are the grid's."""
    metric: Literal["auc", "macro_f1", "accuracy", "mixed"]
    """Metric of ``score``."""
    score: float = Field(ge=0, le=1)
    """Test score of the federated model after the last round."""
    standard_error: float | None = Field(ge=0)
    """Standard error over test samples; for a personalized method, over the clients."""
    num_samples: int = Field(gt=0)
    """Number of test samples."""
    failures: int = Field(ge=0)
    """Number of answers that could not be parsed."""
    num_rounds: int = Field(ge=0)
    """Number of trained rounds."""
    bytes_up: int = Field(ge=0)
    """Bytes sent by all clients."""
    bytes_down: int = Field(ge=0)
    """Bytes received by all clients."""
    settings: str = Field(pattern=_SHA256)
    """SHA-256 of ``config.yaml``."""
    split: str = Field(pattern=_SHA256)
    """SHA-256 of ``manifest.json``. Entries with the same value were trained and tested on the same samples."""
    answers: str = Field(pattern=_SHA256)
    """SHA-256 of ``predictions.json``."""


class Leaderboard(BaseModel):
    """The file. Its JSON schema is ``Leaderboard.model_json_schema()``."""

    model_config = _STRICT

    version: Literal[1] = 1
    """Version of the file format."""
    code: str
    """Version of the code on which scores depend."""
    versions: dict[str, str]
    """Versions of the package, Python and the libraries."""
    entries: list[Entry]
    """The cells, in the grid's order."""


def submit(cells: Sequence[Cell], output: Path) -> Path:
    """Check a sweep and write ``leaderboard.json`` to its folder.

    Every cell of the grid must be finished by this version of the code with the grid's settings. Its split must be the one that the settings give,
    its answers must belong to the test samples, and all rounds must be present. Scores, bytes and failures of the result must agree with the rounds and
    the answers.

    Returns:
        The path of the file.

    Raises:
        RunError: naming every failed check. The file is not written then.
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
        raise RunError(f"{output}: {len(problems)} check(s) failed; leaderboard.json was not written:\n{listing(problems)}")
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
    """Read a ``leaderboard.json``.

    Raises:
        RunError: if the file cannot be read or has another format.
    """
    try:
        return Leaderboard.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not a leaderboard of this version of fedmllm: {' '.join(str(error).split())[:400]}") from error


def _wrong(cell: Cell, folder: Path, trained: Trained, held: Resident) -> Iterator[str]:
    """Yield the failed checks of a cell."""
    for changed in differences(Experiment.load(folder / "config.yaml"), cell.experiment):
        yield f"config.yaml differs from the grid (the cell's setting and the grid's): {changed}"
    data = spread(held.dataset(cell.experiment), cell.experiment.federation, cell.seed)
    if json.loads((folder / "manifest.json").read_text(encoding="utf-8")) != manifest(data, cell.scenario, cell.seed):
        yield "manifest.json is not the split that the settings give"
    expected = answered(data.dataset.metric, [Prediction(sample, None) for sample in data.dataset.test])
    if not all(_same_questions(expected, model) for model in trained.answers):
        yield "predictions.json does not answer the test samples"
    else:
        yield from _wrong_numbers(trained)


def _same_questions(expected: Answered, model: Answered) -> bool:
    same = (expected.metric, expected.metrics) == (model.metric, model.metrics)
    return same and np.array_equal(expected.truth, model.truth) and np.array_equal(expected.domain, model.domain)


def _wrong_numbers(trained: Trained) -> Iterator[str]:
    """Yield the numbers of a result that disagree with its rounds and answers."""
    result, rounds = trained.result, trained.run.rounds
    if [line.round for line in rounds] != list(range(1, result.num_rounds + 1)):
        yield f"metrics.jsonl does not have exactly the rounds 1 to {result.num_rounds}"
    computed = {
        "score": mean(model.score() for model in trained.answers),
        "bytes_up": sum(line.bytes_up for line in rounds),
        "bytes_down": sum(line.bytes_down for line in rounds),
        "failures": sum(int((~np.isfinite(model.guess) | (model.guess < 0)).sum()) for model in trained.answers),
    }
    recorded = {"score": trained.score, "bytes_up": result.bytes_up, "bytes_down": result.bytes_down}
    # Other scores do not distinguish failures from other wrong answers.
    if result.metric in CLASSES:
        recorded["failures"] = result.details["federated"]["failures"]
    for name, value in recorded.items():
        if abs(value - computed[name]) > TOLERANCE:
            yield f"result.json: {name} is {value}, computed from rounds and answers it is {computed[name]}"


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
