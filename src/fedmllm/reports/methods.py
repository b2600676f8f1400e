"""Describes all methods and strategies and measures their costs, for ``fedmllm methods`` and the tables of ``docs/methods.md``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedmllm import weights as W
from fedmllm.algorithms import ALGORITHMS, PUBLISHED, STRATEGIES, Algorithm, Client
from fedmllm.algorithms.strategies import Strategy
from fedmllm.engine.base import Assignment, SecureStage, Split, scores_here
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.stages import Stage
from fedmllm.privacy.secagg.messages import Message
from fedmllm.randomness import generator
from fedmllm.registry import added
from fedmllm.training.rules import LocalResult
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import PERSONAL, ClientFailure, ClientUpdate, Metrics, Record, Sample, Weights

ROUNDS = 2
"""Number of rounds in a trial. Some methods behave differently after the first round."""

WIDTH, RANK = 6, 2


def catalog() -> Record:
    """Return every method and strategy as JSON: its description, its parameters and its costs."""
    return {
        "methods": {name: {**_described(cls), **_properties(cls()), **costs(cls())} for name, cls in ALGORITHMS.items()},
        "strategies": {name: {**_described(cls), **_changes(name, cls)} for name, cls in STRATEGIES.items()},
    }


def from_plugins() -> Record:
    """Return the rows of methods and strategies that plugins have added, each with the module it came from as ``origin``."""
    methods, strategies = added("method"), added("strategy")
    described = {name: {**_described(cls), **_properties(cls()), **costs(cls())} for name, cls in ALGORITHMS.items() if name in methods}
    changed = {name: {**_described(cls), **_changes(name, cls)} for name, cls in STRATEGIES.items() if name in strategies}
    return {
        "methods": {name: row | {"origin": methods[name]} for name, row in described.items()},
        "strategies": {name: row | {"origin": strategies[name]} for name, row in changed.items()},
    }


def first_paragraph(doc: str | None) -> str:
    """Return the first paragraph of a docstring in one line, with code in single backticks."""
    return " ".join((doc or "").strip().split("\n\n")[0].split()).replace("``", "`")


def _described(cls: type[Any]) -> Record:
    """Return the description of a class from its docstrings and fields."""
    reference = first_paragraph(inspect.getmodule(cls).__doc__)
    return {
        "title": re.split(r"\. ", reference, maxsplit=1)[0].removesuffix("."),
        "reference": reference,
        "summary": first_paragraph(cls.__doc__),
        "parameters": {field.name: field.default for field in dataclasses.fields(cls)},
    }


def _properties(method: Algorithm) -> Record:
    return {
        "kind": method.kind,
        "exact": method.exact,
        "heterogeneous_ranks": method.heterogeneous_ranks,
        "personalized": method.personalized,
        "streams": not method.needs_individual_updates,
        "smallest_cohort": method.smallest_cohort,
    }


def _changes(name: str, cls: type[Strategy]) -> Record:
    changed = [*(["client"] if cls.rule is not Strategy.rule else []), *(["weight"] if cls().reweighs else [])]
    changed += ["prompt"] if cls.wording else []
    return {"kind": "strategy", "changes": changed, "published": name in PUBLISHED}


def costs(method: Algorithm) -> Record:
    """Return what a method sends and keeps, measured in two trials whose cohorts differ by one client.

    The unit of sizes is one LoRA adapter: A and B of all modules in float32, for modules with as many inputs as outputs.

    Returns:
        ``up`` and ``down``: the size per client and round if all clients take part, e.g. ``1 + K`` with K clients, or ``0, then K`` if the
        first round differs. ``client_state``: sizes by name. ``server_state``: names.
    """
    small = _trial(method, method.smallest_cohort)
    large = _trial(method, method.smallest_cohort + 1)
    return {
        "up": _over_rounds(small.cohort, small.up, large.up),
        "down": _over_rounds(small.cohort, small.down, large.down),
        "client_state": {name: float(size) for name, size in small.client_state.items()},
        "server_state": list(small.server_state),
    }


@dataclasses.dataclass(frozen=True)
class _Trial:
    """The measurements of a trial, in adapters. ``up`` and ``down`` list the rounds and are per client."""

    cohort: int
    up: list[Fraction]
    down: list[Fraction]
    client_state: dict[str, Fraction]
    server_state: tuple[str, ...]


def _trial(method: Algorithm, cohort: int) -> _Trial:
    """Run the real round loop on small random factors, with all clients in every round."""
    numbers = generator(0, "methods")
    shapes = {"layer.lora_A.weight": (RANK, WIDTH), "layer.lora_B.weight": (WIDTH, RANK), "layer": (WIDTH, WIDTH)}
    tensors = {name: torch.from_numpy(numbers.standard_normal(shape)).float() for name, shape in shapes.items()}
    frozen = {"layer": tensors.pop("layer")}
    stage = Stage("trial", {f"client-{i}": () for i in range(cohort)}, ROUNDS, cohort)
    with TemporaryDirectory() as folder:
        store = RunStore(Path(folder))
        loop = Loop(method, _ScalingEngine(), TrainingConfig(), Split(lambda weights, base: {"score": 0.0}), store, 0)
        state = run_stage(loop, stage, method.init(tensors, frozen))
        rounds = store.records(stage.name)
        kept = store.client_states(stage.name).load("client-0", state.accepted["client-0"])
    adapter = W.num_bytes(tensors)
    return _Trial(
        cohort,
        [Fraction(line["bytes_up"], cohort * adapter) for line in rounds],
        [Fraction(line["bytes_down"], cohort * adapter) for line in rounds],
        {name: Fraction(W.num_bytes(slot), adapter) for name, slot in kept.items()},
        tuple(state.slots),
    )


class _ScalingEngine:
    """An engine without a model. Its clients follow the method's rule, but multiply every tensor by 1.1 instead of training it."""

    remote = False

    def __init__(self) -> None:
        self._asked: dict[str, Assignment] = {}

    def submit(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> None:
        """Record the task of each client."""
        self._asked |= dict.fromkeys(clients, assignment)

    def completed(self, order: Sequence[str] | None = None) -> Iterator[ClientUpdate]:
        """Yield one update per client."""
        for name in list(self._asked) if order is None else order:
            yield self._update(self._asked.pop(name), name)

    def carry(self, stage: SecureStage) -> Iterator[tuple[str, Message | ClientFailure]]:
        """Do nothing: the clients of a trial send their updates."""
        raise NotImplementedError("trials send updates in the clear")

    def cancel(self) -> None:
        """Forget all tasks."""
        self._asked.clear()

    def scores(self, assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
        """Return the scores that the split gives to any weights."""
        return scores_here(assignment, clients, split)

    def _update(self, assignment: Assignment, name: str) -> ClientUpdate:
        algorithm, received, round_num = assignment.algorithm, assignment.broadcast.weights, assignment.broadcast.round_num
        rule = algorithm.local_rule(assignment.broadcast, Client(name, assignment.kept(name)))
        ended: Weights = {tensor: 1.1 * value for tensor, value in {**received, **rule.start}.items()}
        upload = rule.finish(LocalResult(ended, received, {"steps": 1.0}, ended))
        if keeps := {**upload.keeps, **({PERSONAL: ended} if rule.personal else {})}:
            assignment.keep(name, keeps)
        update = {tensor: upload.weights[tensor] - value for tensor, value in received.items() if algorithm.uploads(round_num, tensor)}
        return ClientUpdate(name, update, 1, {"steps": 1.0}, upload.extras)


def _over_rounds(cohort: int, small: Sequence[Fraction], large: Sequence[Fraction]) -> str:
    """Return the terms of the rounds as text, such as ``0, then K``; one term if all rounds are equal."""
    terms = [_term(cohort, a, b) for a, b in zip(small, large, strict=True)]
    return ", then ".join(dict.fromkeys(terms))


def _term(cohort: int, small: Fraction, large: Fraction) -> str:
    """Return ``a + b K`` as text, given its values at K = ``cohort`` and K = ``cohort + 1``."""
    slope = large - small
    constant = small - cohort * slope
    parts = [f"{float(constant):g}"] if constant or not slope else []
    return " + ".join([*parts, *(["K" if slope == 1 else f"{float(slope):g} K"] if slope else [])])
