"""Every method trains a real model for ten rounds, also with all strategies and, where supported, with different ranks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import ALGORITHMS, STRATEGIES, AlgorithmConfig, ServerState, StrategyConfig, build_algorithm
from fedmllm.data.federated import FederatedData
from fedmllm.engine.base import Split
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.stages import Stage
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import attach_lora, frozen_weights, read_weights, write_weights
from fedmllm.models.parts import LoraConfig
from fedmllm.training.batches import Encoder
from fedmllm.training.schedule import ScheduleConfig
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Record, Sample, Weights
from tiny_families import load

STEADY = {"fedadagrad": {"server_learning_rate": 0.01}, "fedavgm": {"server_learning_rate": 0.2}}
"""Methods whose published rate needs more than ten rounds or makes too large a step."""


@pytest.fixture
def vlm() -> VisionLanguageModel:
    """A tiny LLaVA; no method depends on the model's width."""
    return attach_lora(load("llava"), LoraConfig(), 0)


@pytest.fixture
def clients(federation: FederatedData) -> dict[str, list[Sample]]:
    """Five clients with two samples each."""
    samples = itertools.chain.from_iterable(zip(*federation.clients.values(), strict=False))
    return {f"c{k}": list(itertools.islice(samples, 2)) for k in range(5)}


def trained(
    name: str,
    clients: dict[str, list[Sample]],
    vlm: VisionLanguageModel,
    encoder: Encoder,
    folder: Path,
    rounds: int,
    *strategies: str,
    together: int = 1,
) -> tuple[ServerState, list[Record]]:
    config = AlgorithmConfig(
        name=name, parameters=STEADY.get(name, {}), strategies=tuple(StrategyConfig(name=strategy) for strategy in strategies)
    )
    algorithm, training = build_algorithm(config), TrainingConfig(schedule=ScheduleConfig(over="none"), learning_rate=3e-3)
    engine = InProcessEngine(vlm, encoder, training, together)
    loop = Loop(algorithm, engine, training, Split(lambda weights, base: {"score": 0.0}), RunStore(folder), 0)
    ranks = dict(zip(clients, (2, 8, 4, 8, 1), strict=True)) if algorithm.heterogeneous_ranks else {}
    start = algorithm.init(read_weights(vlm.model), frozen_weights(vlm))
    state = run_stage(loop, Stage("federated", clients, rounds, 5, ranks=ranks), start)
    return state, RunStore(folder).records("federated")


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_ten_rounds_lower_the_loss(
    name: str, clients: dict[str, list[Sample]], vlm: VisionLanguageModel, encoder: Encoder, tmp_path: Path
) -> None:
    state, records = trained(name, clients, vlm, encoder, tmp_path, 10)
    losses = [record["loss"] for record in records]
    assert losses[-1] < 0.95 * losses[0], losses
    assert W.is_finite(state.weights)
    assert not any(record["refused"] for record in records)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_strategy_composes_with_every_method(
    name: str, clients: dict[str, list[Sample]], vlm: VisionLanguageModel, encoder: Encoder, tmp_path: Path
) -> None:
    """Strategies that change the weights of updates are left out for methods that ignore these weights: that combination is refused."""
    composed = [strategy for strategy, cls in STRATEGIES.items() if not (cls().reweighs and ALGORITHMS[name].ignores_weights)]
    state, records = trained(name, clients, vlm, encoder, tmp_path, 1, *composed)
    assert W.is_finite(state.weights)
    assert not records[0]["refused"]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_parallel_clients_train_as_one_by_one(
    name: str, clients: dict[str, list[Sample]], vlm: VisionLanguageModel, encoder: Encoder, tmp_path: Path
) -> None:
    """Two rounds in float64 with the strategies that train: waves of four clients and one client, with one to three samples each.

    Adam divides by the gradient's size, so rounding decides the direction of a whole step where a gradient is nearly zero.
    """
    vlm.model.double()
    uneven = {client: (samples * 2)[: (2, 1, 3)[k % 3]] for k, (client, samples) in enumerate(clients.items())}
    initial, ends = read_weights(vlm.model), []
    for together in (1, 4):
        write_weights(vlm.model, initial)
        folder = tmp_path / str(together)
        ends.append(trained(name, uneven, vlm, encoder, folder, 2, "adaptive_regularization", "feature_alignment", together=together)[0])
    way = W.norm({**W.subtract(ends[0].weights, initial), **ends[0].base})
    assert way > 0
    assert W.norm(W.subtract(ends[0].weights, ends[1].weights)) < 0.02 * way
    assert all(W.norm(W.subtract(ends[0].slots[kind], ends[1].slots[kind])) <= 0.02 * W.norm(ends[0].slots[kind]) for kind in ends[0].slots)


def test_updates_have_the_clients_rank(
    clients: dict[str, list[Sample]], vlm: VisionLanguageModel, encoder: Encoder, tmp_path: Path
) -> None:
    """Ranks 2, 8, 4, 8 and 1 of 8 send 23 eighths of an adapter in each direction."""
    _, records = trained("hetlora", clients, vlm, encoder, tmp_path, 1)
    adapter = W.num_bytes(read_weights(vlm.model))
    assert records[0]["bytes_up"] == records[0]["bytes_down"] == adapter * 23 // 8


def test_a_client_of_lower_rank_trains_as_a_model_of_that_rank(
    clients: dict[str, list[Sample]], vlm: VisionLanguageModel, encoder: Encoder, tmp_path: Path
) -> None:
    """It changes nothing beyond its rank: A keeps its initial values there, and B stays zero."""
    only = {"c4": clients["c4"]}
    algorithm, training = build_algorithm(AlgorithmConfig(name="hetlora")), TrainingConfig(learning_rate=3e-3)
    loop = Loop(algorithm, InProcessEngine(vlm, encoder, training), training, Split(lambda w, b: {"score": 0.0}), RunStore(tmp_path), 0)
    initial = read_weights(vlm.model)
    state = run_stage(loop, Stage("federated", only, 3, 1, ranks={"c4": 2}), algorithm.init(initial, {}))
    beyond, before = (factors.beyond(weights, 2) for weights in (state.weights, initial))
    assert all(torch.equal(tensor, before[name]) for name, tensor in beyond.items())
    assert all(not torch.equal(state.weights[name], tensor) for name, tensor in initial.items())


def stuck(weights: Weights) -> list[tuple[str, int]]:
    """Directions that no gradient can move: their row of A and their column of B are both zero."""
    return [(m, i) for m, pair in factors.pairs(weights) for i in range(len(pair.a)) if not (pair.a[i].any() or pair.b[:, i].any())]


@pytest.mark.parametrize("name", [name for name in sorted(ALGORITHMS) if ALGORITHMS[name].heterogeneous_ranks])
def test_after_ten_rounds_no_direction_is_stuck(
    name: str, federation: FederatedData, vlm: VisionLanguageModel, encoder: Encoder, tmp_path: Path
) -> None:
    """Cohorts of two out of ten clients with ranks 2, 4 and 8. Their ranks often sum to less than 8."""
    samples = list(itertools.chain.from_iterable(federation.clients.values()))
    some = {f"c{k}": [samples[k]] for k in range(10)}
    algorithm, training = build_algorithm(AlgorithmConfig(name=name)), TrainingConfig(learning_rate=3e-3)
    loop = Loop(algorithm, InProcessEngine(vlm, encoder, training), training, Split(lambda w, b: {"score": 0.0}), RunStore(tmp_path), 0)
    ranks = {client: (2, 4, 8)[k % 3] for k, client in enumerate(some)}
    state = run_stage(loop, Stage("federated", some, 10, 2, ranks=ranks), algorithm.init(read_weights(vlm.model), {}))
    cohorts = [[ranks[client] for client in record["clients"]] for record in RunStore(tmp_path).records("federated")]
    assert any(sum(cohort) < 8 for cohort in cohorts)
    assert stuck(state.weights) == []


def changed(a: ServerState, b: ServerState) -> set[str]:
    """Which factors differ: A, B or both."""
    return {name.split(".")[-2] for name in a.weights if not torch.equal(a.weights[name], b.weights[name])}


@pytest.mark.parametrize(("name", "moves"), [("ffa_lora", ["lora_B", "lora_B"]), ("rolora", ["lora_B", "lora_A"])])
def test_a_factor_that_does_not_train_does_not_move(
    name: str, moves: list[str], clients: dict[str, list[Sample]], vlm: VisionLanguageModel, encoder: Encoder, tmp_path: Path
) -> None:
    """FFA-LoRA never trains A. RoLoRA trains B in the first round and A in the second. Afterwards all adapter weights are trainable again."""
    initial = read_weights(vlm.model)
    states = [ServerState(initial)]
    for rounds in (1, 2):
        write_weights(vlm.model, initial)
        states.append(trained(name, clients, vlm, encoder, tmp_path / str(rounds), rounds)[0])
    assert [changed(a, b) for a, b in itertools.pairwise(states)] == [{move} for move in moves]
    assert all(parameter.requires_grad for name, parameter in vlm.model.named_parameters() if "lora_" in name)


def test_strategies_do_not_change_the_personalized_model(
    clients: dict[str, list[Sample]], vlm: VisionLanguageModel, encoder: Encoder, tmp_path: Path
) -> None:
    """In the first round, where both start from the same weights, Ditto's personalized model is the same with and without strategies."""
    initial, kept = read_weights(vlm.model), []
    for strategies in ((), ("label_calibration", "feature_alignment")):
        write_weights(vlm.model, initial)
        trained("ditto", clients, vlm, encoder, tmp_path / str(len(strategies)), 1, *strategies)
        kept.append(RunStore(tmp_path / str(len(strategies))).client_states("federated").load("c0", [0])["personal"])
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in initial)
