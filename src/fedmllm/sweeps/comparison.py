"""The results of a sweep: scores by method and column, ranks, and methods against the first one, sample by sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from fedmllm.errors import RunError
from fedmllm.evaluation.metrics import error_over_models
from fedmllm.evaluation.predictions import Answered, from_record
from fedmllm.randomness import generator
from fedmllm.run.reader import Run, read_run
from fedmllm.run.results import RunResult
from fedmllm.sweeps.statistics import Interval, paired

RESAMPLES = 200
"""Of the test samples, from which their noise is known to a twentieth."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""In C where PyYAML was built so: a table of a thousand cells reads their settings in a tenth of the time."""


class Column(NamedTuple):
    """What a method is tried on."""

    model: str
    dataset: str
    scenario: str


@dataclass(frozen=True)
class Trained:
    """A finished cell.

    Attributes:
        method, column, seed: which.
        code: the version of the code that trained it.
        run: its folder's files.
        answers: of its final model, or of its clients' models, to the test split.
    """

    method: str
    column: Column
    seed: int
    code: str
    run: Run
    answers: tuple[Answered, ...]

    @property
    def result(self) -> RunResult:
        """The outcome."""
        if self.run.result is None:
            raise RunError(f"{self.run.name}: not finished; run fedmllm sweep again")
        return self.run.result

    @property
    def score(self) -> float:
        """Of the federated model."""
        found = self.result.scores["federated"]
        if found is None:
            raise RunError(f"{self.run.name}: the result has no score of the federated model; remove the cell and run fedmllm sweep again")
        return found

    def baseline(self, key: str) -> float | None:
        """The score of a baseline trained beside it; None where there was none."""
        return self.result.scores.get(key)

    @cached_property
    def same_test(self) -> bool:
        """Whether other seeds are tested on these samples too, or on some of them: data in files are the same for every seed, generated data are not."""
        return _names_files(yaml.load(self.run.config, _LOADER).get("data", {}))

    @cached_property
    def resampled(self) -> NDArray[np.float64]:
        """The score on ``RESAMPLES`` resamples of the test samples, the same for all cells of a dataset."""
        # Undefined where a class is wanting, for all models alike: drawn again.
        scores = [model.resampled(generator(0, "comparison"), RESAMPLES) for model in self.answers]
        return np.asarray(np.mean(scores, axis=0))


class Chosen(Trained):
    """A finished cell of an AUC, scored by chosen options instead of their probabilities."""

    @property
    def score(self) -> float:
        """Of the federated model; of a personalized method the mean over the clients' models."""
        return mean(model.hard().score() for model in self.answers)

    def baseline(self, key: str) -> float | None:
        """As far as a single model made it."""
        return self.result.details.get(key, {}).get("auc_hard")


@dataclass(frozen=True)
class Beside(Trained):
    """A finished cell, scored by what stands beside the headline; its answers are those of ``Answered.by``.

    Attributes:
        metric: one of ``SIDE_BY_SIDE``.
    """

    metric: str = "accuracy"

    @property
    def score(self) -> float:
        """Of the federated model; of a personalized method the mean over the clients' models."""
        return mean(model.score() for model in self.answers)

    def baseline(self, key: str) -> float | None:
        """As far as the run noted it."""
        return self.result.details.get(key, {}).get(self.metric)


def _names_files(settings: object) -> bool:
    """Whether a section, or one within it, has a ``root``."""
    if isinstance(settings, Mapping):
        return settings.get("root") is not None or any(map(_names_files, settings.values()))
    return isinstance(settings, list) and any(map(_names_files, settings))


class Gain(NamedTuple):
    """How far a method lies above another.

    Attributes:
        mean: over seeds and columns, each weighing alike.
        interval: of the mean, see ``intervals.paired``; None for a single seed.
        won, cells: in how many cells it scored higher, and of how many.
        seeds: how many seeds there were.
    """

    mean: float
    interval: Interval | None
    won: int
    cells: int
    seeds: int


@dataclass(frozen=True)
class Sweep:
    """All finished cells, and the order in which the grid names things.

    Attributes:
        name: of the sweep.
        methods, columns, seeds: as far as a cell of theirs is finished.
        cells: by method, column and seed.
        published: by dataset, method and scenario, what others have reported, in percent.
    """

    name: str
    methods: tuple[str, ...]
    columns: tuple[Column, ...]
    seeds: tuple[int, ...]
    cells: dict[tuple[str, Column, int], Trained]
    published: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The method that others are compared with."""
        return self.methods[0]

    @property
    def shared(self) -> tuple[Column, ...]:
        """Columns in which every method has a cell, in which alone numbers that are no differences can be compared; all of them where there is none."""
        held = {(method, column) for method, column, _ in self.cells}
        return tuple(c for c in self.columns if all((method, c) in held for method in self.methods)) or self.columns

    def of(self, method: str, columns: Sequence[Column] = ()) -> list[Trained]:
        """A method's cells."""
        chosen = columns or self.columns
        return [cell for (name, column, _), cell in self.cells.items() if name == method and column in chosen]

    def scores(self, method: str, columns: Sequence[Column] = ()) -> dict[int, float]:
        """By seed, the mean over columns, of the seeds that have all of them."""
        chosen = columns or self.columns
        return {
            seed: mean(self.cells[method, column, seed].score for column in chosen)
            for seed in self.seeds
            if all((method, column, seed) in self.cells for column in chosen)
        }

    def mean_and_error(self, method: str, columns: Sequence[Column] = ()) -> tuple[float, float | None] | None:
        """Over seeds; None where there is none."""
        found = list(self.scores(method, columns).values())
        return (mean(found), error_over_models(found)) if found else None

    def by(self, metric: str) -> Sweep:
        """The same cells scored by one of ``SIDE_BY_SIDE``; those whose answers do not say which class they are, are left out."""
        found: dict[tuple[str, Column, int], Trained] = {}
        for key, c in self.cells.items():
            answers = [other for model in c.answers if (other := model.by(metric)) is not None]
            if answers:
                found[key] = Beside(c.method, c.column, c.seed, c.code, c.run, tuple(answers), metric)
        return replace(self, cells=found)

    def ranks(self, columns: Sequence[Column] = ()) -> dict[str, float]:
        """Mean over columns of a method's place among those that have all of them, 1 for the best; ties share the mean of theirs."""
        chosen = list(columns or self.columns)
        entered = [method for method in self.methods if all(self.scores(method, [column]) for column in chosen)]
        table = np.array([[mean(self.scores(method, [column]).values()) for column in chosen] for method in entered])
        if not entered:
            return {}
        better = (table[None] > table[:, None]).sum(1)
        tied = (table[None] == table[:, None]).sum(1) - 1
        return dict(zip(entered, (1 + better + tied / 2).mean(1).tolist(), strict=True))

    def gain(self, method: str, over: str = "", columns: Sequence[Column] = ()) -> Gain | None:
        """Over another method, the first one unless named, in the columns and seeds that both have; None where there are none."""
        other, chosen = over or self.reference, columns or self.columns
        pairs = {
            seed: [
                (self.cells[method, column, seed], self.cells[other, column, seed])
                for column in chosen
                if (method, column, seed) in self.cells and (other, column, seed) in self.cells
            ]
            for seed in self.seeds
        }
        pairs = {seed: rows for seed, rows in pairs.items() if rows}
        if not pairs:
            return None
        by_seed = [mean(a.score - b.score for a, b in rows) for rows in pairs.values()]
        resampled = np.mean([np.mean([a.resampled - b.resampled for a, b in rows], axis=0) for rows in pairs.values()], axis=0)
        same = any(a.same_test for rows in pairs.values() for a, _ in rows)
        won = sum(a.score > b.score for rows in pairs.values() for a, b in rows)
        found = paired(by_seed, float(resampled.var()), same)
        return Gain(mean(by_seed), found, won, sum(map(len, pairs.values())), len(pairs))


def read_sweep(folder: Path) -> Sweep:
    """All finished cells of a sweep's folder; of several with the same names, trained by different code, the newest.

    Raises:
        RunError: if there is none, or a file is broken.
    """
    order = _order(folder)
    found: dict[tuple[str, Column, int], tuple[float, Trained]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        run_folder = path.with_suffix("")
        if not (run_folder / "result.json").is_file():
            continue
        cell, when = read_cell(path), (run_folder / "result.json").stat().st_mtime
        key = (cell.method, cell.column, cell.seed)
        if key not in found or when > found[key][0]:
            found[key] = (when, cell)
    if not found:
        raise RunError(f"{folder}: no finished cell in it; run fedmllm sweep first")
    cells = {key: cell for key, (_, cell) in found.items()}
    columns = sorted({key[1] for key in cells}, key=lambda c: [_place(order[name], value) for name, value in zip(_PARTS, c, strict=True)])
    methods = sorted({key[0] for key in cells}, key=lambda name: _place(order["methods"], name))
    seeds = tuple(sorted({key[2] for key in cells}))
    return Sweep(folder.resolve().name, tuple(methods), tuple(columns), seeds, cells, order["published"])


_PARTS = ("models", "datasets", "scenarios")


def _place(order: Sequence[str], name: str) -> tuple[int, str]:
    """Where the grid names something; what it does not name any more comes last, by name."""
    return (order.index(name), "") if name in order else (len(order), name)


def _order(folder: Path) -> dict[str, Any]:
    """The names of the grid and what others have published, as ``fedmllm sweep`` noted them."""
    path = folder / "grid.json"
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return {name: [str(value) for value in noted[name]] for name in ("methods", *_PARTS)} | {"published": noted["published"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read ({error}); give the folder of a sweep, or run fedmllm sweep again") from error


def read_cell(path: Path) -> Trained:
    """A finished cell, given the file of its names.

    Raises:
        RunError: if it is not there, or a file is broken.
    """
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
        column = Column(labels["model"], labels["dataset"], labels["scenario"])
        answers = tuple(from_record(json.loads((path.with_suffix("") / "predictions.json").read_text(encoding="utf-8"))))
        return Trained(labels["method"], column, labels["seed"], labels["code"], read_run(path.with_suffix("")), answers)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"{path}: the cell cannot be read ({error}); remove it and run fedmllm sweep again") from error
