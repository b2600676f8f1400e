"""Rounds of a method's server with five clients that send random updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedmllm import factors
from fedmllm.algorithms import Algorithm, AlgorithmConfig, ServerState, build_algorithm
from fedmllm.engine.intake import Intake
from fedmllm.types import ClientUpdate, Population, Weights

A, B = "m.lora_A.weight", "m.lora_B.weight"
RANK, COUNTS, STEPS = 3, (3, 1, 8, 4, 2), (5, 2, 9, 4, 1)


def start() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {A: torch.randn(RANK, 6, generator=generator), B: 0.3 * torch.randn(5, RANK, generator=generator)}


def build(name: str, **parameters: float) -> Algorithm:
    return build_algorithm(AlgorithmConfig(name=name, parameters=parameters))


def begin(algorithm: Algorithm) -> ServerState:
    frozen = {"m": torch.randn(5, 6, generator=torch.Generator().manual_seed(9))}
    return dataclasses.replace(algorithm.init(start(), frozen), population=Population(7))


def updates(algorithm: Algorithm, state: ServerState, size: float = 0.1, ranks: Sequence[int | None] = (None,) * 5) -> list[ClientUpdate]:
    """Five clients' updates of a round; with ``size`` 0 they are zero."""
    generator = torch.Generator().manual_seed(100 + state.round_num)
    found = []
    for k, (count, steps, rank) in enumerate(zip(COUNTS, STEPS, ranks, strict=True)):
        names = [name for name in state.weights if algorithm.uploads(state.round_num, name)]
        update = {n: size * torch.randn(state.weights[n].shape, generator=generator) for n in names}
        extras = {kind: {n: size * torch.randn(t.shape, generator=generator) for n, t in update.items()} for kind in algorithm.client_sends}
        cut = {kind: factors.cut(tensors, rank) for kind, tensors in extras.items()}
        found.append(ClientUpdate(f"c{k}", factors.cut(update, rank), count, {"steps": float(steps)}, cut, {"image": count}, rank))
    return found


def server_round(algorithm: Algorithm, state: ServerState, sent: Sequence[ClientUpdate]) -> ServerState:
    aggregator = Intake(algorithm, state)
    for update in sent:
        aggregator.fold(update)
    return algorithm.server_step(state, aggregator.aggregate())


def effective(state: ServerState) -> Weights:
    """The model's change by module: the products of the factors plus what was merged into the frozen weights."""
    return {m: p + state.base.get(m, torch.zeros(())).double() for m, p in factors.products(state.weights).items()}


def plain_mean(state: ServerState, sent: Sequence[ClientUpdate], name: str) -> np.ndarray[Any, Any]:
    """Return a tensor after a step by the updates' mean with uniform weights, in float64."""
    moved: np.ndarray[Any, Any] = np.mean([s.update[name].double().numpy() for s in sent], axis=0)
    return moved + state.weights[name].double().numpy()
