"""The results of a sweep: scores by method and column, ranks, and gains over the first method with the noise of the test samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from fedmllm.errors import RunError
from fedmllm.evaluation.metrics import error_over_models
from fedmllm.sweeps.statistics import Interval, paired
from fedmllm.sweeps.trained import Column, Rescored, Trained, read_cell


class Gain(NamedTuple):
    """The difference in score between two methods.

    Attributes:
        mean: mean difference; all seeds weigh the same, and within a seed all columns.
        interval: confidence interval of the mean, see ``statistics.paired``; None for a single seed.
        won, cells: number of cells in which the method scored higher, and number of cells compared.
        seeds: number of seeds compared.
    """

    mean: float
    interval: Interval | None
    won: int
    cells: int
    seeds: int


@dataclass(frozen=True)
class Sweep:
    """All finished cells of a sweep, with names in the grid's order.

    Attributes:
        name: the sweep's name.
        methods, columns, seeds: those with at least one finished cell.
        cells: the cells by method, column and seed.
        published: published results in percent, by dataset, method and scenario.
    """

    name: str
    methods: tuple[str, ...]
    columns: tuple[Column, ...]
    seeds: tuple[int, ...]
    cells: dict[tuple[str, Column, int], Trained]
    published: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The method that all others are compared with: the first."""
        return self.methods[0]

    @property
    def shared(self) -> tuple[Column, ...]:
        """Columns in which every method has a cell, or all columns if there are none. Means of scores are comparable only over these columns."""
        held = {(method, column) for method, column, _ in self.cells}
        return tuple(c for c in self.columns if all((method, c) in held for method in self.methods)) or self.columns

    def of(self, method: str, columns: Sequence[Column] = ()) -> list[Trained]:
        """Return a method's cells, in all columns by default."""
        chosen = columns or self.columns
        return [cell for (name, column, _), cell in self.cells.items() if name == method and column in chosen]

    def scores(self, method: str, columns: Sequence[Column] = ()) -> dict[int, float]:
        """Return a method's mean score over columns by seed, for seeds with a cell in every column."""
        chosen = columns or self.columns
        return {
            seed: mean(self.cells[method, column, seed].score for column in chosen)
            for seed in self.seeds
            if all((method, column, seed) in self.cells for column in chosen)
        }

    def mean_and_error(self, method: str, columns: Sequence[Column] = ()) -> tuple[float, float | None] | None:
        """Return mean and standard error over seeds of a method's score; None if no seed has all columns."""
        found = list(self.scores(method, columns).values())
        return (mean(found), error_over_models(found)) if found else None

    def by(self, metric: str) -> Sweep:
        """Return the same cells scored by one of ``SIDE_BY_SIDE``. Cells whose answers have no classes are omitted."""
        found: dict[tuple[str, Column, int], Trained] = {}
        for key, c in self.cells.items():
            answers = [other for model in c.answers if (other := model.by(metric)) is not None]
            if answers:
                found[key] = Rescored(c.method, c.column, c.seed, c.code, c.run, tuple(answers), metric)
        return replace(self, cells=found)

    def ranks(self, columns: Sequence[Column] = ()) -> dict[str, float]:
        """Return the mean rank over columns of each method that has all of them; 1 is the best. Ties share their mean rank."""
        chosen = list(columns or self.columns)
        entered = [method for method in self.methods if all(self.scores(method, [column]) for column in chosen)]
        table = np.array([[mean(self.scores(method, [column]).values()) for column in chosen] for method in entered])
        if not entered:
            return {}
        better = (table[None] > table[:, None]).sum(1)
        tied = (table[None] == table[:, None]).sum(1) - 1
        return dict(zip(entered, (1 + better + tied / 2).mean(1).tolist(), strict=True))

    def gain(self, method: str, over: str = "", columns: Sequence[Column] = ()) -> Gain | None:
        """Return a method's gain over another one, in the columns and seeds that both have.

        Args:
            method: the method.
            over: the method to compare with; the first method by default.
            columns: columns to compare in; all by default.

        Returns:
            The gain, or None if the two have no cells in common.
        """
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
    """Read all finished cells of a sweep folder. Of several cells with the same names, trained by different code, it takes the newest.

    Raises:
        RunError: if there is no finished cell, or a file is broken.
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
        raise RunError(f"{folder}: the folder has no finished cell; run fedmllm sweep first")
    cells = {key: cell for key, (_, cell) in found.items()}
    columns = sorted({key[1] for key in cells}, key=lambda c: [_place(order[name], value) for name, value in zip(_PARTS, c, strict=True)])
    methods = sorted({key[0] for key in cells}, key=lambda name: _place(order["methods"], name))
    seeds = tuple(sorted({key[2] for key in cells}))
    return Sweep(folder.resolve().name, tuple(methods), tuple(columns), seeds, cells, order["published"])


_PARTS = ("models", "datasets", "scenarios")


def _place(order: Sequence[str], name: str) -> tuple[int, str]:
    """Return a sort key for the grid's order. Names that are no longer in the grid come last, by name."""
    return (order.index(name), "") if name in order else (len(order), name)


def _order(folder: Path) -> dict[str, Any]:
    """Return the names of the grid and the published results, as ``fedmllm sweep`` recorded them."""
    path = folder / "grid.json"
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return {name: [str(value) for value in noted[name]] for name in ("methods", *_PARTS)} | {"published": noted["published"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: cannot be read ({error}); name a sweep folder, or run fedmllm sweep again") from error
