"""Ranks a sweep's methods, or one method's settings written as methods, by validation scores only."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from fedmllm.errors import RunError, listing
from fedmllm.sweeps.comparison import Sweep
from fedmllm.sweeps.trained import Column


class Choice(NamedTuple):
    """A method's result on the validation split.

    Attributes:
        method: its name.
        score: the final model's validation score, averaged over seeds and columns.
        error: standard error over seeds; None for a single seed.
    """

    method: str
    score: float
    error: float | None


def ranked(sweep: Sweep) -> list[Choice]:
    """Return the methods from best to worst, ties by name, over the columns that all methods have and the seeds that have all of these columns.

    Raises:
        RunError: if a cell has no validation score, because then only the test split would be left to choose by; or if there is no such
            column, or no such seed of a method.
    """
    columns = [column for column in sweep.columns if all(sweep.of(method, [column]) for method in sweep.methods)]
    if not columns:
        raise RunError("no column is finished for all methods; run fedmllm sweep again")
    cells = [cell for method in sweep.methods for cell in sweep.of(method, columns)]
    if bare := [cell.run.name for cell in cells if "score" not in cell.result.validation]:
        raise RunError(
            f"{len(bare):,} cell(s) have no validation score, and methods are never chosen by test scores; set evaluation.every and "
            f"data.validation_share above 0 and run fedmllm sweep again:\n{listing(bare)}"
        )
    return sorted((_choice(sweep, method, columns) for method in sweep.methods), key=lambda choice: (-choice.score, choice.method))


def _choice(sweep: Sweep, method: str, columns: Sequence[Column]) -> Choice:
    by_seed = [[sweep.cells.get((method, column, seed)) for column in columns] for seed in sweep.seeds]
    means = [mean(cell.result.validation["score"] for cell in cells if cell) for cells in by_seed if all(cells)]
    if not means:
        raise RunError(f"{method}: no seed is finished in all of the {len(columns)} columns to compare; run fedmllm sweep again")
    return Choice(method, mean(means), stdev(means) / len(means) ** 0.5 if len(means) > 1 else None)
