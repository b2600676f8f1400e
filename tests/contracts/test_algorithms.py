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


def momentum(start: Array, rounds: list[tuple[list[Array], list[int]]]) -> Array:
    """FedAvgM at its defaults: m <- 0.9 m + D, w <- w + m."""
    weights, m = start.astype(np.float64), np.zeros(start.shape)
    for updates, counts in rounds:
        m = 0.9 * m + np.average(np.array(updates, dtype=np.float64), axis=0, weights=counts)
        weights = weights + m
    return weights


def adaptive(second: Callable[[Array, Array], Array]) -> Reference:
    """Reddi et al., Algorithm 2, at our defaults: eta = tau = 1e-3, beta1 = 0.9, beta2 = 0.99; D is the plain mean."""

    def rule(start: Array, rounds: list[tuple[list[Array], list[int]]]) -> Array:
        weights, m, v = start.astype(np.float64), np.zeros(start.shape), np.full(start.shape, 1e-6)
        for updates, _ in rounds:
            mean = np.array(updates, dtype=np.float64).mean(axis=0)
            m = 0.9 * m + 0.1 * mean
            v = second(v, mean * mean)
            weights = weights + 1e-3 * m / (np.sqrt(v) + 1e-3)
        return weights

    return rule


@dataclasses.dataclass(frozen=True)
class Case:
    """A method: its server rule in a few lines of NumPy, and the parameters that make it a simpler method."""

    reference: Reference
    neutral: dict[str, float] | None = None
    simpler: str = "fedavg"


CASES: dict[str, Case] = {
    "fedavg": Case(average),
    "fedprox": Case(average, neutral={"proximal_mu": 0.0}),
    "fedavgm": Case(momentum, neutral={"beta1": 0.0}),
    "fedadagrad": Case(adaptive(lambda v, s: v + s)),
    "fedadam": Case(adaptive(lambda v, s: 0.99 * v + 0.01 * s)),
    "fedyogi": Case(adaptive(lambda v, s: v - 0.01 * s * np.sign(v - s))),
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
        mean.add(term, algorithm.weight(count))
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


def test_fedprox_refuses_to_push_away() -> None:
    with pytest.raises(ValueError, match="proximal_mu must not be negative"):
        AlgorithmConfig(name="fedprox", parameters={"proximal_mu": -0.1})


FEDOPT = ("fedadagrad", "fedadam", "fedyogi")


@pytest.mark.parametrize("name", ["fedavgm", *FEDOPT])
def test_the_reference_variant_starts_with_the_first_update_itself(name: str) -> None:
    """Round 1: m = D. Round 2: m = 0.9 D_1 + 0.1 D_2, and for the FedOpt family v is fed with m^2 in both."""
    algorithm = build(name, reference=True)
    state = algorithm.init(start())
    momenta = []
    for r in range(2):
        state = server_round(algorithm, state, updates(r))
        momenta.append(state.slots["momentum"]["b"].numpy())
    counts = [algorithm.weight(count) for _, count in updates(0)]
    means = [np.average([term["b"].double().numpy() for term, _ in updates(r)], axis=0, weights=counts) for r in range(2)]
    np.testing.assert_allclose(momenta[0], means[0], atol=1e-12)
    np.testing.assert_allclose(momenta[1], 0.9 * means[0] + 0.1 * means[1], atol=1e-12)
    if name == "fedadagrad":
        np.testing.assert_allclose(state.slots["second_moment"]["b"].numpy(), 1e-6 + momenta[0] ** 2 + momenta[1] ** 2, atol=1e-12)


def test_yogi_lets_the_second_moment_fall_slower_than_adam() -> None:
    """After one large and one tiny update: Adam forgets at 1 % of v, Yogi at 1 % of the tiny square."""
    large, tiny = ({name: torch.full_like(t, size) for name, t in start().items()} for size in (1.0, 1e-3))
    second = {}
    for name in ("fedadam", "fedyogi"):
        algorithm = build(name)
        state = server_round(algorithm, server_round(algorithm, algorithm.init(start()), [(large, 1)]), [(tiny, 1)])
        second[name] = state.slots["second_moment"]["b"][0].item()
    assert second["fedadam"] == pytest.approx(0.99 * (0.99e-6 + 0.01) + 0.01e-6)
    assert second["fedyogi"] == pytest.approx(1e-6 + 0.01 - 0.01e-6)


@pytest.mark.parametrize("name", ["fedavgm", *FEDOPT])
def test_hyper_parameters_out_of_range_are_refused(name: str) -> None:
    for wrong in ({"beta1": 1.0}, {"beta1": -0.1}, {"server_learning_rate": 0.0}, {"beta2": 1.0} if name in FEDOPT[1:] else {"beta1": 2.0}):
        with pytest.raises(ValueError, match=r"parameters: .* (must lie in|must be above)"):
            AlgorithmConfig(name=name, parameters=wrong)
