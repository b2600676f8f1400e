"""Ranks a sweep's methods, or one method's settings written as methods, by validation scores only."""

from __future__ import annotations

from statistics import mean, stdev
from typing import NamedTuple

from fedmllm.errors import RunError, listing
from fedmllm.sweeps.comparison import Sweep


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
    """Return the methods from best to worst, ties by name, over the columns that all methods have.

    Raises:
        RunError: if a cell has no validation score, because then only the test split would be left to choose by.
    """
    cells = [cell for method in sweep.methods for cell in sweep.of(method, sweep.shared)]
    if bare := [cell.run.name for cell in cells if "score" not in cell.result.validation]:
        raise RunError(
            f"{len(bare):,} cell(s) have no validation score, and methods are never chosen by test scores; set evaluation.every and "
            f"data.validation_share above 0 and run fedmllm sweep again:\n{listing(bare)}"
        )
    if not cells:
        raise RunError("no column is finished for all methods; run fedmllm sweep again")
    return sorted((_choice(sweep, method) for method in sweep.methods), key=lambda choice: (-choice.score, choice.method))


def _choice(sweep: Sweep, method: str) -> Choice:
    by_seed: dict[int, list[float]] = {}
    for (name, column, seed), cell in sweep.cells.items():
        if name == method and column in sweep.shared:
            by_seed.setdefault(seed, []).append(cell.result.validation["score"])
    means = [mean(scores) for scores in by_seed.values()]
    return Choice(method, mean(means), stdev(means) / len(means) ** 0.5 if len(means) > 1 else None)
