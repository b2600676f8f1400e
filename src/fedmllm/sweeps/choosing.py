"""Choosing among a sweep's methods, or one's settings written as methods: by the validation part, and nothing else."""

from __future__ import annotations

from statistics import mean, stdev
from typing import NamedTuple

from fedmllm.errors import RunError, listing
from fedmllm.sweeps.comparison import Sweep


class Choice(NamedTuple):
    """What a method reached.

    Attributes:
        method: its name.
        score: the mean over seeds and columns of the final model's score on the validation part.
        error: standard error over seeds; None for a single seed.
    """

    method: str
    score: float
    error: float | None


def ranked(sweep: Sweep) -> list[Choice]:
    """The methods, the best first, ties by name; over the columns that all of them have.

    Raises:
        RunError: if a cell has no score on a validation part: what would be left to choose by is the test split.
    """
    cells = [cell for method in sweep.methods for cell in sweep.of(method, sweep.shared)]
    if bare := [cell.run.name for cell in cells if "score" not in cell.result.validation]:
        raise RunError(
            f"{len(bare):,} cell(s) have no score on a validation part, and nothing is chosen on test data; set evaluation.every and "
            f"data.validation_share above 0 and run fedmllm sweep again:\n{listing(bare)}"
        )
    if not cells:
        raise RunError("no column is finished by all methods; run fedmllm sweep again")
    return sorted((_choice(sweep, method) for method in sweep.methods), key=lambda choice: (-choice.score, choice.method))


def _choice(sweep: Sweep, method: str) -> Choice:
    by_seed: dict[int, list[float]] = {}
    for (name, column, seed), cell in sweep.cells.items():
        if name == method and column in sweep.shared:
            by_seed.setdefault(seed, []).append(cell.result.validation["score"])
    means = [mean(scores) for scores in by_seed.values()]
    return Choice(method, mean(means), stdev(means) / len(means) ** 0.5 if len(means) > 1 else None)
