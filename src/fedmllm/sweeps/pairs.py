"""Pairs of methods of a sweep that differ only in their strategies, to measure what strategies add."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import permutations
from typing import Any, NamedTuple

import yaml

from fedmllm.algorithms import AlgorithmConfig
from fedmllm.sweeps.comparison import Sweep
from fedmllm.sweeps.trained import Column, Trained


class Pair(NamedTuple):
    """A method, and the same method with fewer strategies.

    Attributes:
        added: names of the strategies that only ``method`` has.
        method, over: the two methods' names in the grid.
    """

    added: tuple[str, ...]
    method: str
    over: str

    @property
    def label(self) -> str:
        """The name in tables and figures."""
        return f"{' + '.join(self.added)} on {self.over}"


def pairs(sweep: Sweep) -> list[Pair]:
    """Return all pairs of a sweep, those with a single strategy first. Cells with the same column and seed decide whether two methods are a pair."""
    found = []
    for method, over in permutations(sweep.methods, 2):
        places = ((column, seed) for name, column, seed in sweep.cells if name == method and (over, column, seed) in sweep.cells)
        if (place := next(places, None)) is None:
            continue
        more, less = sweep.cells[method, *place], sweep.cells[over, *place]
        added = [name for name in more.result.strategies if name not in less.result.strategies]
        kept = set(less.result.strategies) <= set(more.result.strategies)
        if added and kept and _apart_from_strategies(more) == _apart_from_strategies(less):
            found.append(Pair(tuple(added), method, over))
    return sorted(found, key=lambda pair: len(pair.added))


def acting(sweep: Sweep, pair: Pair) -> Sweep:
    """Return the sweep without cells in which none of the pair's added strategies could have an effect. There, both methods trained the same."""
    idle = {key for key, cell in sweep.cells.items() if key[0] == pair.method and set(pair.added) <= set(cell.result.idle)}
    return replace(sweep, cells={key: cell for key, cell in sweep.cells.items() if key not in idle})


def kinds(sweep: Sweep) -> dict[str, list[Column]]:
    """Return the columns by the kind of their scenario, e.g. ``missing`` for ``missing-0.4``."""
    found: dict[str, list[Column]] = {}
    for column in sweep.columns:
        found.setdefault(column.scenario.split("-")[0], []).append(column)
    return found


def _apart_from_strategies(cell: Trained) -> str:
    """Return the settings without strategies, without the prompt (which counts as one) and without evaluation."""
    settings: dict[str, Any] = yaml.safe_load(cell.run.config)
    settings.pop("evaluation", None)
    settings.setdefault("data", {}).pop("prompt", None)
    algorithm = settings.setdefault("algorithm", {})
    algorithm.pop("strategies", None)
    algorithm["name"] = AlgorithmConfig(name=cell.result.algorithm).method
    return json.dumps(settings, sort_keys=True)
