"""A sweep's finished cells: their names, runs and answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from fedmllm.errors import RunError
from fedmllm.evaluation.predictions import Answered, from_record
from fedmllm.randomness import generator
from fedmllm.run.reader import Run, read_run
from fedmllm.run.results import RunResult

RESAMPLES = 200
"""Number of resamples of the test samples. They give the noise to within about 5%."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""YAML loader, in C if PyYAML has it: it reads the settings of a thousand cells in a tenth of the time."""


class Column(NamedTuple):
    """A model, dataset and scenario on which methods are compared."""

    model: str
    dataset: str
    scenario: str


@dataclass(frozen=True)
class Trained:
    """A finished cell.

    Attributes:
        method, column, seed: identify the cell.
        code: version of the code that trained the cell.
        run: the content of its run folder.
        answers: answers to the test split of its final model, or of each personalized model.
    """

    method: str
    column: Column
    seed: int
    code: str
    run: Run
    answers: tuple[Answered, ...]

    @property
    def result(self) -> RunResult:
        """The run's result."""
        if self.run.result is None:
            raise RunError(f"{self.run.name}: not finished; run fedmllm sweep again")
        return self.run.result

    @property
    def score(self) -> float:
        """Score of the federated model."""
        found = self.result.scores["federated"]
        if found is None:
            raise RunError(f"{self.run.name}: the result has no score of the federated model; remove the cell and run fedmllm sweep again")
        return found

    def baseline(self, key: str) -> float | None:
        """Return the score of a baseline of the same run; None if the run has none."""
        return self.result.scores.get(key)

    @cached_property
    def same_test(self) -> bool:
        """Whether other seeds are tested on some of the same samples. Data in files are the same for every seed; generated data are not."""
        return _names_files(yaml.load(self.run.config, _LOADER).get("data", {}))

    @cached_property
    def resampled(self) -> NDArray[np.float64]:
        """Scores on ``RESAMPLES`` resamples of the test samples, which are the same for all cells of a dataset; shape (RESAMPLES,)."""
        # A resample without one of the classes has no defined score for any model, and is drawn again.
        scores = [model.resampled(generator(0, "comparison"), RESAMPLES) for model in self.answers]
        return np.asarray(np.mean(scores, axis=0))


class Chosen(Trained):
    """A finished cell whose AUC is computed from the chosen options instead of their probabilities."""

    @property
    def score(self) -> float:
        """Score of the federated model; for a personalized method, the mean over the clients' models."""
        return mean(model.hard().score() for model in self.answers)

    def baseline(self, key: str) -> float | None:
        """Return the score of a baseline; None if the run did not record it, e.g. for means over clients."""
        return self.result.details.get(key, {}).get("auc_hard")


@dataclass(frozen=True)
class Rescored(Trained):
    """A finished cell, scored by another metric than the headline. Its answers are those of ``Answered.by``.

    Attributes:
        metric: one of ``SIDE_BY_SIDE``.
    """

    metric: str = "accuracy"

    @property
    def score(self) -> float:
        """Score of the federated model; for a personalized method, the mean over the clients' models."""
        return mean(model.score() for model in self.answers)

    def baseline(self, key: str) -> float | None:
        """Return the score of a baseline; None if the run did not record it."""
        return self.result.details.get(key, {}).get(self.metric)


def _names_files(settings: object) -> bool:
    """Return whether a section, or one inside it, sets ``root``."""
    if isinstance(settings, Mapping):
        return settings.get("root") is not None or any(map(_names_files, settings.values()))
    return isinstance(settings, list) and any(map(_names_files, settings))


def read_cell(path: Path) -> Trained:
    """Read a finished cell.

    Args:
        path: the JSON file with the cell's names.

    Raises:
        RunError: if the cell is missing, or a file is broken.
    """
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
        column = Column(labels["model"], labels["dataset"], labels["scenario"])
        answers = tuple(from_record(json.loads((path.with_suffix("") / "predictions.json").read_text(encoding="utf-8"))))
        return Trained(labels["method"], column, labels["seed"], labels["code"], read_run(path.with_suffix("")), answers)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"{path}: the cell cannot be read ({error}); remove it and run fedmllm sweep again") from error
