"""The contract of every federated method. A new method adds one row to ``CASES``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedmllm.algorithms as package
from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import ALGORITHMS, Algorithm, AlgorithmConfig, Client, ServerState, build_algorithm
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.intake import Intake, refusal
from fedmllm.training.rules import LocalResult
from fedmllm.types import ClientUpdate, Population, Weights

Array = np.ndarray
A, B = "m.lora_A.weight", "m.lora_B.weight"
RANK, COUNTS, STEPS = 3, (3, 1, 8, 4, 2), (5, 2, 9, 4, 1)


@dataclasses.dataclass(frozen=True)
class Sent:
    """One client's update in NumPy, with its sample count, its steps and its rank."""

    update: dict[str, Array]
    count: int
    steps: int
    rank: int | None


@dataclasses.dataclass
class Numbers:
    """A reference's state: the weights, what was merged into the frozen weights, and named memory."""

    weights: dict[str, Array]
    base: dict[str, Array] = dataclasses.field(default_factory=dict)
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    round_num: int = 0


Reference = Callable[[Numbers, Sequence[Sent]], None]


def shares(sent: Sequence[Sent]) -> Array:
    return np.array([s.count for s in sent]) / sum(s.count for s in sent)


def mean(sent: Sequence[Sent], name: str, p: Array) -> Array:
    return sum((q * s.update[name] for q, s in zip(p, sent, strict=True)), np.zeros(()))


def by_tensor(rule: Callable[[Numbers, Sequence[Sent], str], Array]) -> Reference:
    """A reference that computes each tensor's change separately."""

    def reference(state: Numbers, sent: Sequence[Sent]) -> None:
        added = {name: rule(state, sent, name) for name in state.weights if name in sent[0].update}
        state.weights |= {name: state.weights[name] + change for name, change in added.items()}

    return reference


average = by_tensor(lambda state, sent, name: mean(sent, name, shares(sent)))
plain = by_tensor(lambda state, sent, name: np.mean([s.update[name] for s in sent], axis=0))


def momentum(state: Numbers, sent: Sequence[Sent], name: str) -> Array:
    """FedAvgM at its defaults: m <- 0.9 m + D."""
    state.memory[name] = 0.9 * state.memory.get(name, 0.0) + mean(sent, name, shares(sent))
    return np.asarray(state.memory[name])


def adaptive(second: Callable[[Array, Array], Array], beta1: float = 0.9) -> Reference:
    """Reddi et al., Algorithm 2, at the defaults: eta = tau = 1e-3, beta2 = 0.99, beta1 = 0.9 (0 for Adagrad). D is the plain mean."""

    def rule(state: Numbers, sent: Sequence[Sent], name: str) -> Array:
        m, v = state.memory.get(name, (0.0, np.full(state.weights[name].shape, 1e-6)))
        d = np.mean([s.update[name] for s in sent], axis=0)
        m, v = beta1 * m + (1 - beta1) * d, second(v, d * d)
        state.memory[name] = (m, v)
        return np.asarray(1e-3 * m / (np.sqrt(v) + 1e-3))

    return by_tensor(rule)


def nova(state: Numbers, sent: Sequence[Sent], name: str) -> Array:
    p = shares(sent)
    tau = sum(q * s.steps for q, s in zip(p, sent, strict=True))
    return np.asarray(tau * sum(q * s.update[name] / s.steps for q, s in zip(p, sent, strict=True)))


def trimmed(state: Numbers, sent: Sequence[Sent], name: str) -> Array:
    """With five clients, one is dropped at each end."""
    return np.asarray(np.sort([s.update[name] for s in sent], axis=0)[1:-1].mean(axis=0))


def krum(state: Numbers, sent: Sequence[Sent]) -> None:
    """With five clients and one Byzantine, a score sums the squared distances to the 5 - 1 - 2 = 2 nearest others."""
    flat = np.array([np.concatenate([s.update[name].ravel() for name in sorted(s.update)]) for s in sent])
    scores = [sorted(((flat[k] - flat[j]) ** 2).sum() for j in range(len(flat)) if j != k)[:2] for k in range(len(flat))]
    best = sent[int(np.argmin([sum(row) for row in scores]))]
    state.weights |= {name: state.weights[name] + best.update[name] for name in best.update}


def own(state: Numbers, s: Sent, name: str) -> Array:
    """A client's trained tensor at its own rank."""
    cut = state.weights[name] if s.rank is None else state.weights[name][: s.rank] if "lora_A" in name else state.weights[name][:, : s.rank]
    return np.asarray(cut + s.update[name])


def product(state: Numbers, sent: Sequence[Sent]) -> Array:
    """The weighted mean of the clients' products."""
    return np.asarray(sum(q * own(state, s, B) @ own(state, s, A) for q, s in zip(shares(sent), sent, strict=True)))


def flora(state: Numbers, sent: Sequence[Sent]) -> None:
    state.base = {"m": state.base.get("m", 0.0) + product(state, sent)}


def fedex(state: Numbers, sent: Sequence[Sent]) -> None:
    whole = product(state, sent)
    average(state, sent)
    state.base = {"m": state.base.get("m", 0.0) + whole - state.weights[B] @ state.weights[A]}


def flexlora(state: Numbers, sent: Sequence[Sent]) -> None:
    """By the SVD of the full matrix, which the method never forms. Directions beyond the cohort's largest rank stay in it."""
    largest = max(s.rank or RANK for s in sent)
    unheld = state.weights[B][:, largest:] @ state.weights[A][largest:]
    u, s, vt = np.linalg.svd(product(state, sent) + unheld, full_matrices=False)
    sign = np.sign(np.take_along_axis(vt[:RANK], np.abs(vt[:RANK]).argmax(1)[:, None], 1))
    state.weights = {A: sign * vt[:RANK], B: (u[:, :RANK] * s[:RANK]) * sign.T}


def hetlora(state: Numbers, sent: Sequence[Sent]) -> None:
    norms = np.array([np.linalg.norm(own(state, s, B) @ own(state, s, A)) for s in sent])
    padded = {name: [np.zeros(state.weights[name].shape) for _ in sent] for name in (A, B)}
    for k, s in enumerate(sent):
        rank = s.rank or RANK
        padded[A][k][:rank], padded[B][k][:, :rank] = own(state, s, A), own(state, s, B)
    before, largest = state.weights, max(s.rank or RANK for s in sent)
    state.weights = {name: np.tensordot(norms / norms.sum(), np.array(rows), axes=1) for name, rows in padded.items()}
    state.weights[A][largest:], state.weights[B][:, largest:] = before[A][largest:], before[B][:, largest:]


def fedilora(state: Numbers, sent: Sequence[Sent]) -> None:
    after = {name: tensor.copy() for name, tensor in state.weights.items()}
    for i in range(RANK):
        having = [s for s in sent if (s.rank or RANK) > i]
        for s, p in zip(having, shares(having) if having else [], strict=True):
            after[A][i] += p * s.update[A][i]
            after[B][:, i] += p * s.update[B][:, i]
    state.weights = after


def yoco(state: Numbers, sent: Sequence[Sent]) -> None:
    """B is the weighted mean. A keeps the principal directions with 0.95 of the squared length."""
    rows = np.array([own(state, s, A).ravel() for s in sent])
    _, s, vt = np.linalg.svd(rows, full_matrices=False)
    kept = int(np.argmax(np.cumsum(s**2) / (s**2).sum() >= 0.95 - 1e-12)) + 1
    a = shares(sent) @ (rows @ vt[:kept].T) @ vt[:kept]
    state.weights = {A: a.reshape(state.weights[A].shape), B: state.weights[B] + mean(sent, B, shares(sent))}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method's server rule in a few lines of NumPy, and the parameters that reduce it to a simpler method."""

    reference: Reference
    neutral: dict[str, float] | None = None
    simpler: str = "fedavg"


CASES: dict[str, Case] = {
    "ditto": Case(average),
    "fedavg": Case(average),
    "fedprox": Case(average, neutral={"proximal_mu": 0.0}),
    "fedavgm": Case(by_tensor(momentum), neutral={"beta1": 0.0}),
    "calibrated_flexlora": Case(flexlora, {"calibration": 0.0}, "flexlora"),
    "fedadagrad": Case(adaptive(lambda v, s: v + s, beta1=0.0)),
    "fedadam": Case(adaptive(lambda v, s: 0.99 * v + 0.01 * s)),
    "fedyogi": Case(adaptive(lambda v, s: v - 0.01 * s * np.sign(v - s))),
    "fedex_lora": Case(fedex),
    "fedilora": Case(fedilora, neutral={"edit_threshold": -1}),
    "fedit": Case(average, neutral={}),
    "fednova": Case(by_tensor(nova)),
    "fedsa_lora": Case(average),
    "ffa_lora": Case(average),
    "flexlora": Case(flexlora),
    "flora": Case(flora),
    "hetlora": Case(hetlora),
    "krum": Case(krum),
    "median": Case(by_tensor(lambda state, sent, name: np.median([s.update[name] for s in sent], axis=0)), {}, "median"),
    "rolora": Case(average),
    "scaffold": Case(plain),
    "trimmed_mean": Case(by_tensor(trimmed)),
    "yoco": Case(yoco),
}

NAMES = sorted(CASES)
RANKED = [name for name in NAMES if ALGORITHMS[name].heterogeneous_ranks]


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


def test_every_method_has_a_row_and_a_file() -> None:
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")} - {"__init__", "base", "checks", "state", "transforms"}
    assert set(CASES) == set(ALGORITHMS) == files


def in_numpy(sent: Sequence[ClientUpdate]) -> list[Sent]:
    return [Sent({n: t.double().numpy() for n, t in s.update.items()}, s.num_samples, int(s.metrics["steps"]), s.rank) for s in sent]


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
    """The effective matrix never changes. The factors stay equal too, unless the method splits products anew."""
    algorithm = build(name)
    state = first = begin(algorithm)
    for _ in range(3):
        state = server_round(algorithm, state, updates(algorithm, state, size=0.0))
    torch.testing.assert_close(effective(state)["m"], effective(first)["m"], atol=1e-5, rtol=0)
    if name not in ("flexlora", "calibrated_flexlora", "yoco", "hetlora"):
        assert all(torch.equal(state.weights[key], tensor) for key, tensor in first.weights.items())


def test_flora_resets_its_factors_each_round() -> None:
    """FLoRA merges the clients' products and resets the factors. Zero updates add nothing only while B is 0, as at the start of a run."""
    algorithm = build("flora")
    zero = {A: start()[A], B: torch.zeros_like(start()[B])}
    state = algorithm.init(zero, {})
    for _ in range(2):
        state = server_round(algorithm, state, updates(algorithm, state, size=0.0))
    assert float(effective(state)["m"].abs().max()) == 0
    after = server_round(algorithm, state, updates(algorithm, state))
    assert all(torch.equal(after.weights[key], tensor) for key, tensor in zero.items())


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


def test_no_trimming_is_the_plain_mean_and_full_trimming_the_median() -> None:
    algorithm = build("trimmed_mean", trim=0.0)
    state = begin(algorithm)
    sent = updates(algorithm, state)
    expected = np.mean([s.update[B].double().numpy() for s in sent], axis=0) + state.weights[B].double().numpy()
    np.testing.assert_allclose(server_round(algorithm, state, sent).weights[B].numpy(), expected, atol=1e-6)
    most, median = (server_round(build(n, **p), state, sent).weights for n, p in (("trimmed_mean", {"trim": 0.49}), ("median", {})))
    assert all(torch.equal(most[key], median[key]) for key in most)


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


@pytest.mark.parametrize(("trim", "count"), [(0.0, 1), (0.1, 10), (0.2, 5), (0.34, 3), (0.49, 3), (1 / 3, 3), (1 / 49, 50)])
def test_smallest_cohort_of_a_trimmed_mean_is_the_first_that_trims(trim: float, count: int) -> None:
    """It trims one client at each end; with one client fewer it is the plain mean. In floating point, 1 / 49 of 49 is less than 1."""
    algorithm = build("trimmed_mean", trim=trim)
    assert algorithm.smallest_cohort == count
    if trim:
        outlier = torch.zeros(count)
        outlier[0] = 1e6
        assert float(algorithm.middle(outlier)) == 0  # type: ignore[attr-defined]
        assert float(algorithm.middle(outlier[:-1])) > 1  # type: ignore[attr-defined]


def test_krum_with_all_selected_is_the_plain_mean() -> None:
    algorithm = build("krum", num_selected=5)
    state = begin(algorithm)
    sent = updates(algorithm, state)
    expected = np.mean([s.update[A].double().numpy() for s in sent], axis=0) + state.weights[A].double().numpy()
    np.testing.assert_allclose(server_round(algorithm, state, sent).weights[A].numpy(), expected, atol=1e-6)


def test_fednova_equals_fedavg_for_equal_step_counts() -> None:
    state = begin(build("fednova"))
    sent = [dataclasses.replace(s, metrics={"steps": 4.0}) for s in updates(build("fednova"), state)]
    nova_end, average_end = (server_round(build(name), state, sent).weights for name in ("fednova", "fedavg"))
    for key in nova_end:
        torch.testing.assert_close(nova_end[key], average_end[key], atol=1e-7, rtol=0)


def test_fedprox_penalty_is_half_mu_times_the_squared_distance() -> None:
    method = build("fedprox", proximal_mu=0.2)
    rule = method.local_rule(method.broadcast(begin(method)), Client())
    now = {key: tensor + 0.5 for key, tensor in start().items()}
    value = rule.penalty(now, start(), 0.0)
    assert value is not None
    assert float(value) == pytest.approx(0.5 * 0.2 * 33 * 0.25, rel=1e-5)


def test_scaffold_corrects_gradients_and_keeps_the_mean_gradient() -> None:
    """Option II under SGD: w_K = w - lr sum(g + c - c_k), so c_k - c + (w - w_K) / (K lr) is the mean of g."""
    method = build("scaffold")
    state = dataclasses.replace(begin(method), slots={"control": {key: torch.full_like(t, 0.3) for key, t in start().items()}})
    kept = {key: torch.full_like(t, 0.1) for key, t in start().items()}
    rule = method.local_rule(method.broadcast(state), Client("c0", {"control": kept}))
    assert rule.edit_gradient is not None
    generator, rate, steps = torch.Generator().manual_seed(3), 0.05, 6
    gradients = [torch.randn(start()[A].shape, generator=generator) for _ in range(steps)]
    weights = start()[A]
    for gradient in gradients:
        weights = weights - rate * rule.edit_gradient(A, gradient)
    option_two = 0.1 - 0.3 + (start()[A] - weights) / (steps * rate)
    raw = {A: torch.stack(gradients).mean(0), B: torch.zeros_like(start()[B])}
    upload = rule.finish(LocalResult(start(), start(), {}, raw))
    torch.testing.assert_close(upload.keeps["control"][A], option_two, atol=1e-5, rtol=0)
    torch.testing.assert_close(upload.extras["control"][A], option_two - 0.1, atol=1e-5, rtol=0)


def test_scaffold_moves_the_server_control_by_the_share_of_participating_clients() -> None:
    method = build("scaffold")
    state = begin(method)
    sent = updates(method, state)
    after = server_round(method, state, sent)
    expected = 5 / 7 * np.mean([s.extras["control"][A].double().numpy() for s in sent], axis=0)
    np.testing.assert_allclose(after.slots["control"][A].numpy(), expected, atol=1e-6)


FEDOPT = ("fedadagrad", "fedadam", "fedyogi")


@pytest.mark.parametrize("name", ["fedavgm", *FEDOPT])
def test_the_reference_variant_starts_from_the_first_update(name: str) -> None:
    """Round 1: m = D. Round 2: m = 0.9 D_1 + 0.1 D_2. For Adagrad, m = D_2 in round 2, and v accumulates m^2."""
    algorithm = build(name, reference=True)
    state, momenta, means = begin(algorithm), [], []
    for _ in range(2):
        sent = updates(algorithm, state)
        counts = [algorithm.fold(state, update)[1] for update in sent]
        means.append(np.average([s.update[B].double().numpy() for s in sent], axis=0, weights=counts))
        state = server_round(algorithm, state, sent)
        momenta.append(state.slots["momentum"][B].numpy())
    np.testing.assert_allclose(momenta[0], means[0], atol=1e-12)
    stays = 0.0 if name == "fedadagrad" else 0.9
    np.testing.assert_allclose(momenta[1], stays * means[0] + (1 - stays) * means[1], atol=1e-12)
    if name == "fedadagrad":
        np.testing.assert_allclose(state.slots["second_moment"][B].numpy(), 1e-6 + momenta[0] ** 2 + momenta[1] ** 2, atol=1e-12)


def test_reference_fedadagrad_refuses_a_momentum() -> None:
    """Other methods accept ``beta1`` together with ``reference``."""
    with pytest.raises(ValueError, match=r"parameters: reference: the published code's FedAdagrad has no momentum, got beta1 = 0\.9"):
        build("fedadagrad", reference=True, beta1=0.9)
    assert build("fedadam", reference=True, beta1=0.8)


def test_yogi_lowers_the_second_moment_slower_than_adam() -> None:
    """After a large update, a tiny one lowers v by 1 % of v in Adam, and by 1 % of the tiny square in Yogi."""
    second = {}
    for name in ("fedadam", "fedyogi"):
        algorithm = build(name)
        state = begin(algorithm)
        for size in (1.0, 1e-3):
            state = server_round(algorithm, state, [ClientUpdate("c", {n: torch.full_like(t, size) for n, t in start().items()}, 1)])
        second[name] = state.slots["second_moment"][B][0, 0].item()
    assert second["fedadam"] == pytest.approx(0.99 * (0.99e-6 + 0.01) + 0.01e-6)
    assert second["fedyogi"] == pytest.approx(1e-6 + 0.01 - 0.01e-6)


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


def test_refusal_names_missing_and_unexpected_extras() -> None:
    expected = start()
    update = ClientUpdate("c", start(), 1, extras={"control": {A: start()[A]}})
    assert "control: 1 tensors are missing" in str(refusal(update, expected, ("control",)))
    assert "expected none" in str(refusal(update, expected))
