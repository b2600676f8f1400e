"""Every method goes through this suite; a new method adds one row to ``CASES``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedmllm.algorithms as package
from fedmllm import weights as W
from fedmllm.algorithms import ALGORITHMS, Algorithm, AlgorithmConfig, ServerState, build_algorithm
from fedmllm.engine.checkpoint import RunStore
from fedmllm.types import Weights

Array = np.ndarray
Reference = Callable[[Array, list[tuple[list[Array], list[int]]]], Array]


def average(start: Array, rounds: list[tuple[list[Array], list[int]]]) -> Array:
    """FedAvg in NumPy and float64: w + sum n_k D_k / sum n_k, round after round."""
    weights = start.astype(np.float64)
    for updates, counts in rounds:
        weights = weights + np.tensordot(np.array(counts) / sum(counts), np.array(updates, dtype=np.float64), axes=1)
    return weights


@dataclasses.dataclass(frozen=True)
class Case:
    """A method: its server rule in a few lines of NumPy, and the parameters that make it a simpler method."""

    reference: Reference
    neutral: dict[str, float] | None = None
    simpler: str = "fedavg"


CASES: dict[str, Case] = {
    "fedavg": Case(average),
    "fedprox": Case(average, neutral={"proximal_mu": 0.0}),
}

NAMES = sorted(CASES)


def start() -> Weights:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)}


def updates(round_num: int) -> list[tuple[Weights, int]]:
    generator = torch.Generator().manual_seed(100 + round_num)
    return [({name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in start().items()}, count) for count in (3, 1, 8)]


def server_round(algorithm: Algorithm, state: ServerState, terms: list[tuple[Weights, int]]) -> ServerState:
    mean = W.WeightedMean()
    for term, count in terms:
        mean.add(term, count)
    return algorithm.server_step(state, mean.value())


def build(name: str, **parameters: float) -> Algorithm:
    return build_algorithm(AlgorithmConfig(name=name, parameters=parameters))


def test_every_method_has_a_row_and_a_file() -> None:
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__", "base"}
    assert set(CASES) == set(ALGORITHMS) == files


@pytest.mark.parametrize("name", NAMES)
def test_equals_numpy_over_several_rounds(name: str) -> None:
    algorithm, state = build(name), build(name).init(start())
    rounds = [updates(r) for r in range(4)]
    for terms in rounds:
        state = server_round(algorithm, state, terms)
    for key, tensor in start().items():
        history = [([term[key].numpy() for term, _ in terms], [count for _, count in terms]) for terms in rounds]
        np.testing.assert_allclose(state.weights[key].numpy(), CASES[name].reference(tensor.numpy(), history), atol=1e-6, rtol=0)
    assert state.round_num == 4


@pytest.mark.parametrize("name", NAMES)
def test_zero_updates_are_a_fixed_point(name: str) -> None:
    algorithm, state = build(name), build(name).init(start())
    for _ in range(3):
        state = server_round(algorithm, state, [(W.zeros_like(start()), 2), (W.zeros_like(start()), 5)])
    assert all(torch.equal(state.weights[key], tensor) for key, tensor in start().items())


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_clients_does_not_matter(name: str) -> None:
    algorithm = build(name)
    forward, backward = (server_round(algorithm, algorithm.init(start()), terms).weights for terms in (updates(0), updates(0)[::-1]))
    for key in forward:
        torch.testing.assert_close(forward[key], backward[key], atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_weights_stay_float32_and_the_input_is_left_alone(name: str) -> None:
    algorithm, before = build(name), start()
    state = algorithm.init(before)
    after = server_round(algorithm, state, updates(0))
    assert all(tensor.dtype == torch.float32 for tensor in after.weights.values())
    assert all(torch.equal(before[key], tensor) for key, tensor in start().items())
    assert all(torch.equal(state.weights[key], tensor) for key, tensor in start().items())


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_save_and_load(name: str, tmp_path: Path) -> None:
    algorithm, store = build(name), RunStore(tmp_path)
    state = server_round(algorithm, algorithm.init(start()), updates(0))
    store.save_state("federated", state)
    loaded = store.load_state("federated")
    assert loaded is not None
    after, expected = (server_round(algorithm, s, updates(1)) for s in (loaded, state))
    assert all(torch.equal(after.weights[key], expected.weights[key]) for key in expected.weights)
    assert after.round_num == expected.round_num == 2


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].neutral is not None])
def test_neutral_parameters_give_the_simpler_method(name: str) -> None:
    case = CASES[name]
    assert case.neutral is not None
    own, simpler = build(name, **case.neutral), build(case.simpler)
    rule = own.local_rule(own.broadcast(own.init(start())))
    assert rule == simpler.local_rule(simpler.broadcast(simpler.init(start())))
    a, b = (server_round(algorithm, algorithm.init(start()), updates(0)).weights for algorithm in (own, simpler))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_fedprox_penalty_is_half_mu_times_the_squared_distance() -> None:
    method: Any = build("fedprox", proximal_mu=0.2)
    rule = method.local_rule(method.broadcast(method.init(start())))
    now = {key: tensor + 0.5 for key, tensor in start().items()}
    assert rule.penalty is not None
    assert float(rule.penalty(now, start())) == pytest.approx(0.5 * 0.2 * 17 * 0.25, rel=1e-5)
