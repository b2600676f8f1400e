"""The contract of every federated method. A new method adds one row to ``CASES`` in ``numpy_rules``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import fedmllm.algorithms as package
from contracts.numpy_rules import CASES, Numbers, in_numpy
from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import ALGORITHMS, Algorithm, AlgorithmConfig, Client, ServerState
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.intake import Intake
from fedmllm.types import ClientUpdate
from server_rounds import COUNTS, A, B, begin, build, effective, server_round, start, updates

NAMES = sorted(CASES)
RANKED = [name for name in NAMES if ALGORITHMS[name].heterogeneous_ranks]


def test_every_method_has_a_row_and_a_file() -> None:
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__", "base", "checks", "state", "transforms"}
    assert set(CASES) == set(ALGORITHMS) == files


def assert_equals_reference(name: str, ranks: Sequence[int | None]) -> None:
    """Four rounds equal the reference, which starts each round from the method's rounded weights."""
    algorithm = build(name)
    state = begin(algorithm)
    numbers = Numbers({n: t.double().numpy() for n, t in state.weights.items()})
    numbers.base = {module: tensor.double().numpy() for module, tensor in state.base.items()}
    for _ in range(4):
        sent = updates(algorithm, state, ranks=ranks)
        CASES[name].reference(numbers, in_numpy(sent))
        state = server_round(algorithm, state, sent)
        for key, expected in numbers.weights.items():
            np.testing.assert_allclose(state.weights[key].numpy(), expected, atol=1e-6, rtol=0)
        for module, expected in numbers.base.items():
            np.testing.assert_allclose(state.base[module].numpy(), expected, atol=1e-5, rtol=0)
        assert set(numbers.base) == set(state.base)
        numbers.weights = {n: t.double().numpy() for n, t in state.weights.items()}
    assert state.round_num == 4


@pytest.mark.parametrize("name", NAMES)
def test_equals_numpy_over_several_rounds(name: str) -> None:
    assert_equals_reference(name, (None,) * 5)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("ranks", [(1, 3, 2, 1, 2), (1, 2, 2, 1, 1)])
def test_equals_numpy_with_different_ranks(name: str, ranks: Sequence[int]) -> None:
    """One cohort includes the largest rank, the other does not."""
    assert_equals_reference(name, ranks)


@pytest.mark.parametrize("name", [name for name in RANKED if name != "flora"])
def test_directions_beyond_the_cohorts_ranks_are_kept(name: str) -> None:
    """Clients of rank 1 return zero updates for three rounds. The model does not change."""
    algorithm = build(name)
    state = first = begin(algorithm)
    for _ in range(3):
        state = server_round(algorithm, state, updates(algorithm, state, size=0.0, ranks=(1,) * 5))
    torch.testing.assert_close(effective(state)["m"], effective(first)["m"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if ALGORITHMS[name].kind in ("lora", "one-shot", "personalized")])
def test_fully_trained_layers_are_averaged(name: str) -> None:
    """Methods with a rule of their own for LoRA factors take the weighted mean of all other tensors, in every round."""
    algorithm = build(name)
    whole = {"connector.weight": torch.ones(4), "connector.bias": torch.zeros(2, 3, 1)}
    state = algorithm.init({**start(), **whole}, {"m": torch.randn(5, 6, generator=torch.Generator().manual_seed(9))})
    for _ in range(2):
        sent = updates(algorithm, state, ranks=(1, 3, 2, 1, 2) if algorithm.heterogeneous_ranks else (None,) * 5)
        weights = [algorithm.fold(state, update)[1] for update in sent]
        after = server_round(algorithm, state, sent)
        for key in whole:
            mean = sum((w / sum(weights) * s.update[key].double() for w, s in zip(weights, sent, strict=True)), torch.zeros(()))
            torch.testing.assert_close(after.weights[key].double(), state.weights[key] + mean, atol=1e-6, rtol=0)
            assert algorithm.downloads(key)
        assert list(after.weights) == list(state.weights)
        state = after


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flora"])
def test_zero_updates_are_a_fixed_point(name: str) -> None:
    """The effective matrix never changes. Unless the method refactorizes the product, the factors do not change either."""
    algorithm = build(name)
    state = first = begin(algorithm)
    for _ in range(3):
        state = server_round(algorithm, state, updates(algorithm, state, size=0.0))
    torch.testing.assert_close(effective(state)["m"], effective(first)["m"], atol=1e-5, rtol=0)
    if name not in ("flexlora", "calibrated_flexlora", "yoco", "hetlora"):
        assert all(torch.equal(state.weights[key], tensor) for key, tensor in first.weights.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_clients_does_not_matter(name: str) -> None:
    algorithm = build(name)
    state = begin(algorithm)
    sent = updates(algorithm, state)
    forward, backward = (server_round(algorithm, state, terms) for terms in (sent, sent[::-1]))
    for key in forward.weights:
        torch.testing.assert_close(forward.weights[key], backward.weights[key], atol=1e-6, rtol=0)
    for key in forward.base:
        torch.testing.assert_close(forward.base[key], backward.base[key], atol=1e-6, rtol=0)


def mean_product(algorithm: Algorithm, state: ServerState, sent: Sequence[ClientUpdate]) -> torch.Tensor:
    """``base + sum p_k B_k A_k`` over the clients' trained factors."""
    total = torch.zeros(5, 6, dtype=torch.float64) + (state.base["m"].double() if state.base else 0)
    for update in sent:
        ended = {n: t.double() for n, t in W.add(factors.cut(state.weights, update.rank), update.update).items()}
        total += update.num_samples / sum(COUNTS) * ended[B] @ ended[A]
    return total


@pytest.mark.parametrize("name", [name for name in NAMES if not ALGORITHMS[name].personalized])
def test_exact_means_that_the_aggregate_is_the_mean_of_the_products(name: str) -> None:
    """Over two rounds, with different ranks where the method supports them. A method that is not marked exact must deviate."""
    algorithm = build(name)
    state, errors = begin(algorithm), []
    for ranks in ((None,) * 5, (1, 3, 2, 1, 2) if algorithm.heterogeneous_ranks else (None,) * 5):
        sent = updates(algorithm, state, ranks=ranks)
        expected = mean_product(algorithm, state, sent)
        state = server_round(algorithm, state, sent)
        # FLoRA resets its factors to the start, where B is 0 in a run. Only what was merged counts.
        found = state.base["m"].double() if name == "flora" else effective(state)["m"]
        errors.append(float((found - expected).abs().max()))
    assert (max(errors) < 1e-5) == ALGORITHMS[name].exact, errors


@pytest.mark.parametrize("name", NAMES)
def test_weights_stay_float32_and_the_input_state_is_unchanged(name: str) -> None:
    algorithm = build(name)
    state = begin(algorithm)
    before = {key: tensor.clone() for key, tensor in state.weights.items()}
    after = server_round(algorithm, state, updates(algorithm, state))
    assert all(tensor.dtype == torch.float32 for tensor in after.weights.values())
    assert all(tensor.shape == before[key].shape for key, tensor in after.weights.items())
    assert all(torch.equal(state.weights[key], tensor) for key, tensor in before.items())
    assert after.population == state.population


@pytest.mark.parametrize("name", NAMES)
def test_state_survives_save_and_load(name: str, tmp_path: Path) -> None:
    algorithm, store = build(name), RunStore(tmp_path)
    state = server_round(algorithm, begin(algorithm), updates(algorithm, begin(algorithm)))
    store.save_state("federated", state)
    loaded = store.load_state("federated")
    assert loaded is not None
    loaded = dataclasses.replace(loaded, population=state.population)
    after, expected = (server_round(algorithm, s, updates(algorithm, s)) for s in (loaded, state))
    assert all(torch.equal(after.weights[key], expected.weights[key]) for key in expected.weights)
    assert all(torch.equal(after.base[key], expected.base[key]) for key in expected.base)
    assert after.round_num == expected.round_num == 2


@pytest.mark.parametrize("name", NAMES)
def test_bad_updates_are_refused_and_name_the_client(name: str) -> None:
    """NaN, a wrong shape, unexpected extras and infinite extras are refused. The other updates still complete the round."""
    algorithm = build(name)
    state = begin(algorithm)
    sent = updates(algorithm, state)
    key = next(iter(sent[0].update))
    bad = [
        dataclasses.replace(sent[0], update={**sent[0].update, key: torch.full_like(sent[0].update[key], float("nan"))}),
        dataclasses.replace(sent[1], update={**sent[1].update, key: torch.zeros(2, 2)}),
        dataclasses.replace(sent[2], extras={"surprise": sent[2].update}),
        *(
            dataclasses.replace(sent[3], extras={kind: {k: t * float("inf") for k, t in sent[3].update.items()}})
            for kind in algorithm.client_sends
        ),
    ]
    intake = Intake(algorithm, state, {})
    for update in (*bad, *sent[3:]):
        intake.take(update)
    refused = intake.record()["refused"]
    assert [row["client"] for row in refused] == [update.client for update in bad]
    assert "NaN" in refused[0]["reason"]
    assert "shape (2, 2)" in refused[1]["reason"]
    partial = algorithm.server_step(state, intake.aggregate())
    expected = server_round(algorithm, state, sent[3:])
    assert all(torch.equal(partial.weights[n], expected.weights[n]) for n in expected.weights)


@pytest.mark.parametrize("name", NAMES)
def test_an_aggregate_streams_unless_the_method_needs_each_update(name: str) -> None:
    algorithm = build(name)
    state = begin(algorithm)
    aggregator, held = Intake(algorithm, state), []
    for update in updates(algorithm, state):
        aggregator.fold(update)
        held.append(aggregator.num_bytes)
    assert (held[-1] == held[0]) != algorithm.needs_individual_updates


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].neutral is not None])
def test_neutral_parameters_give_the_simpler_method(name: str) -> None:
    case = CASES[name]
    assert case.neutral is not None
    method, simpler = build(name, **case.neutral), build(case.simpler)
    ends = [server_round(a, s, updates(a, s)) for a in (method, simpler) for s in (begin(a),)]
    rules = [a.local_rule(a.broadcast(s), Client()) for a, s in zip((method, simpler), ends, strict=True)]
    assert rules[0] == rules[1]
    assert all(torch.equal(ends[0].weights[key], ends[1].weights[key]) for key in ends[0].weights)


@pytest.mark.parametrize(("name", "parameters"), [("median", {}), ("trimmed_mean", {}), ("krum", {}), ("krum", {"num_selected": 3})])
def test_robust_methods_withstand_one_arbitrary_update(name: str, parameters: dict[str, float]) -> None:
    """An outlier dominates the plain mean. These methods stay within the range of the honest updates."""
    algorithm = build(name, **parameters)
    state = begin(algorithm)
    sent = updates(algorithm, state)
    sent[2] = dataclasses.replace(sent[2], update={key: tensor * 1e6 for key, tensor in sent[2].update.items()})
    honest = max(float(s.update[key].abs().max()) for s in sent if s is not sent[2] for key in s.update)
    moved = W.subtract(server_round(algorithm, state, sent).weights, state.weights)
    assert max(float(tensor.abs().max()) for tensor in moved.values()) <= honest + 1e-6
    carried = W.subtract(server_round(build("fedavg"), state, sent).weights, state.weights)
    assert max(float(tensor.abs().max()) for tensor in carried.values()) > 1e3


FEDOPT = ("fedadagrad", "fedadam", "fedyogi")


WRONG: list[tuple[str, dict[str, float]]] = [
    *((name, wrong) for name in ("fedavgm", *FEDOPT) for wrong in ({"beta1": 1.0}, {"beta1": -0.1}, {"server_learning_rate": 0.0})),
    *((name, {"beta2": 1.0}) for name in FEDOPT[1:]),
    ("fedprox", {"proximal_mu": -0.1}),
    ("ditto", {"personal_mu": -1.0}),
    ("trimmed_mean", {"trim": 0.5}),
    ("krum", {"num_byzantine": -1}),
    ("krum", {"num_byzantine": 1.5}),
    ("krum", {"num_selected": 0}),
    ("fedilora", {"edit_threshold": 1.5}),
    ("yoco", {"gamma": 0.5}),
    ("yoco", {"energy": 0.0}),
    ("yoco", {"sign_weight": -1.0}),
    ("scaffold", {"server_learning_rate": 0.0}),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_hyperparameters_out_of_range_are_refused(name: str, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"parameters: .* (must be in|must be greater than|must not be negative|must be an integer)"):
        AlgorithmConfig(name=name, parameters=wrong)
