"""Codecs stay within their error bounds, and error feedback loses nothing in the long run."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmllm import factors, train
from fedmllm import weights as W
from fedmllm.algorithms import Algorithm, AlgorithmConfig, ClientContext, Codec, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.engine.base import Split
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.compression import CompressionConfig, compression, sent_through
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.intake import Intake
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.stages import Stage
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.training.batches import Encoder
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Broadcast, ClientUpdate, Slots, Weights

NAMES = ("bfloat16", "int8", "int4", "top_k")
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=40), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))


def codec(name: str, **settings: float) -> Codec:
    (found,) = compression(CompressionConfig.model_validate({"name": name, **settings}))
    return found.codec


def round_trip(name: str, tensor: torch.Tensor, **settings: float) -> torch.Tensor:
    coder = codec(name, **settings)
    return coder.unpack(coder.pack(tensor), tensor.shape)


def test_compression_is_off_by_default() -> None:
    assert compression(CompressionConfig()) == ()


@given(ARRAYS)
def test_bfloat16_keeps_eight_bits(array: np.ndarray) -> None:
    np.testing.assert_allclose(round_trip("bfloat16", torch.from_numpy(array)).numpy(), array, rtol=2**-8, atol=1e-37)


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7)])
@given(array=ARRAYS, block=st.integers(2, 64))
def test_blocks_are_within_half_a_step(name: str, largest: int, array: np.ndarray, block: int) -> None:
    """The error is at most half a step, plus the rounding of the scale.

    The scale may be 2^-8 too small, so the largest entry loses that share of itself. Entries may be lost where the scale is
    below the smallest normal number.
    """
    flat = array.reshape(-1)
    padded = np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    top = np.abs(padded).max(1, keepdims=True)
    bound = np.broadcast_to(top / largest / 2 * (1 + 2**-7) + top * 2**-8 + largest * np.finfo(np.float32).tiny, padded.shape).reshape(-1)[
        : len(flat)
    ]
    error = np.abs(round_trip(name, torch.from_numpy(array), block=block).numpy().reshape(-1) - flat)
    assert (error <= bound).all()


@given(ARRAYS, st.floats(0.01, 1))
def test_top_k_sends_the_largest_entries(array: np.ndarray, fraction: float) -> None:
    flat, count = np.abs(array.reshape(-1)), math.ceil(fraction * array.size)
    found = round_trip("top_k", torch.from_numpy(array), fraction=fraction).numpy().reshape(-1)
    least = np.sort(flat)[::-1][count - 1]
    assert (found != 0).sum() <= count
    np.testing.assert_allclose(np.sort(np.abs(found))[::-1][:count], np.sort(flat)[::-1][:count], rtol=2**-8, atol=1e-37)
    assert (flat[found != 0] >= least).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_stay_so(name: str, value: float) -> None:
    tensor = torch.arange(300.0).reshape(3, 100)
    tensor[1, 7] = value
    assert not torch.isfinite(round_trip(name, tensor)).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    assert float(round_trip(name, torch.zeros(5, 7)).abs().max()) == 0


@pytest.mark.parametrize(("name", "size"), [("bfloat16", 2000), ("int8", 1016), ("int4", 516), ("top_k", 300)])
def test_sizes_match_a_hand_computation(name: str, size: int) -> None:
    """1,000 entries take 2 bytes each; 1 byte each and 8 scales of 2; half a byte each and 8 scales; 50 positions of 4 and values of 2."""
    assert sent_through(codec(name), {"x": torch.randn(10, 100)}, {}).num_bytes == size


@pytest.mark.parametrize("name", ["int4", "top_k"])
def test_error_feedback_loses_nothing_in_the_long_run(name: str) -> None:
    """After many rounds the sum received equals the sum sent, up to one round's loss. Without feedback the loss accumulates."""
    update, coder = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)), codec(name, fraction=0.1)
    arrived, alone, lost = torch.zeros(40, 50), torch.zeros(40, 50), {}
    for _ in range(50):
        received, lost, _ = sent_through(coder, {"x": update}, lost)
        arrived += received["x"]
        alone += sent_through(coder, {"x": update}, {})[0]["x"]
    assert torch.allclose(arrived + lost["x"], 50 * update, atol=1e-3)
    assert float((arrived - 50 * update).norm()) < 0.25 * float((alone - 50 * update).norm())


@pytest.mark.parametrize("name", ["fedavg", "rolora", "scaffold", "ditto", "flexlora"])
def test_updates_are_compressed_and_residuals_stay_at_the_clients(
    name: str, vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData, tmp_path: Path
) -> None:
    """Three rounds of two clients with two samples each. An entry takes 4 bits and a sixteenth of two bytes."""
    algorithm, training = build_algorithm(AlgorithmConfig(name=name)), TrainingConfig()
    clients = {client: list(itertools.islice(samples, 2)) for client, samples in itertools.islice(federation.clients.items(), 2)}
    ends, records, start = [], [], read_weights(vlm.model)
    for chosen in (CompressionConfig(), CompressionConfig(name="int4")):
        store = RunStore(tmp_path / chosen.name)
        engine = InProcessEngine(vlm, encoder, training)
        loop = Loop(algorithm, engine, training, Split(lambda w, b: {"score": 0.0}), store, 0, compression(chosen))
        state = run_stage(loop, Stage("federated", clients, 3, 2), algorithm.init(start, frozen_weights(vlm)))
        # If the method refactorizes the product, its factors do not show how far the model has moved. The product does, since it starts at zero.
        ends.append(factors.products(state.weights) if algorithm.refactorizes else W.subtract(state.weights, start))
        records.append(store.records("federated"))
    for whole, small in zip(*records, strict=True):
        assert small["bytes_up"] == whole["bytes_up"] * (4 + 16 / 128) / 32
        assert not small["refused"]
    kept = RunStore(tmp_path / "int4").client_states("federated").load("client-00", state.accepted["client-00"])
    residuals = {kind.removeprefix("compression.") for kind in kept if kind.startswith("compression.")}
    assert residuals == {"update", *algorithm.client_sends, *(["ended"] if algorithm.refactorizes else [])}
    assert set(kept["compression.update"]) == set(state.weights)
    assert W.norm(kept["compression.update"]) > 0
    assert 0 < W.norm(W.subtract(*ends)) < W.norm(ends[0])


def test_baselines_do_not_compress_updates(tiny: Experiment, tmp_path: Path) -> None:
    values = tiny.model_dump(mode="json") | {"compression": {"name": "int8"}}
    train(Experiment.parse(values | {"evaluation": {"every": 0, "baselines": ["local"]}}), tmp_path / "run")
    store = RunStore(tmp_path / "run")
    federated, local = (store.records(stage)[0] for stage in ("federated", "local-client-00"))
    assert federated["bytes_up"] / len(federated["clients"]) == local["bytes_up"] * (8 + 16 / 128) / 32


A, B = "m.lora_A.weight", "m.lora_B.weight"
TOP = CompressionConfig(name="top_k", fraction=0.25)


def fit_factors(weights: Weights, target: torch.Tensor, rate: float) -> Weights:
    """Five AdamW steps that fit the factors to a matrix."""
    own = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    optimizer = torch.optim.AdamW(own.values(), lr=rate, weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        (0.5 * (own[B] @ own[A] - target).square().sum()).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in own.items()}


def send(method: Algorithm, chosen: CompressionConfig, update: ClientUpdate, kept: Slots, ended: Weights) -> tuple[ClientUpdate, Slots]:
    """An update passed through the transform, as from a client that trained to ``ended``. With ``ended`` empty the residual is not carried over."""
    for transform in compression(chosen):
        return transform.client(update, ClientContext(update.client, method, Broadcast(0, {}), 0, ended, kept))
    return update, {}


def federated(name: str, chosen: CompressionConfig, carry: bool, seed: int) -> tuple[float, float]:
    """Twelve rounds of five clients with random targets.

    Returns half the squared distance of the end from the targets' mean, and the mean cosine between what a client's product
    lost and what its residual adds to the next product.
    """
    rng = torch.Generator().manual_seed(seed)
    common = torch.randn(24, 8, generator=rng) @ torch.randn(8, 20, generator=rng) / 4
    targets = [common + 0.15 * torch.randn(24, 20, generator=rng) for _ in range(5)]
    method = build_algorithm(AlgorithmConfig(name=name))
    state = method.init({A: torch.randn(4, 20, generator=rng) / 20**0.5, B: torch.zeros(24, 4)}, {})
    kept: list[Slots] = [{}] * 5
    lost, cosines = [torch.zeros(0)] * 5, []
    for round_num in range(12):
        aggregator = Intake(method, state)
        for k, target in enumerate(targets):
            ended = fit_factors(state.weights, target, 0.015 * (1 + math.cos(math.pi * round_num / 12)))
            update = ClientUpdate(str(k), W.subtract(ended, state.weights), 1)
            sent, slots = send(method, chosen, update, kept[k], ended if carry else {})
            product, kept[k] = ended[B] @ ended[A], slots
            if slots:
                arrived = W.add(state.weights, sent.update)
                meant = W.add(arrived, slots["update"])
                if round_num:
                    cosines.append(float(torch.cosine_similarity((meant[B] @ meant[A] - product).flatten(), lost[k].flatten(), dim=0)))
                lost[k] = meant[B] @ meant[A] - arrived[B] @ arrived[A]
            aggregator.fold(sent)
        state = method.server_step(state, aggregator.aggregate())
    end = 0.5 * float((state.weights[B] @ state.weights[A] - torch.stack(targets).mean(0)).square().sum())
    return end, float(np.mean(cosines)) if cosines else math.nan


def test_a_residual_is_carried_over_to_a_new_split() -> None:
    """The carried residual has the right direction and lowers the loss.

    FlexLoRA with the largest quarter of the entries, four seeds. Loss above that of whole updates: 45.9 without feedback,
    14.1 with unchanged residuals (cosine 0.43), 6.0 with residuals carried over (0.97).
    """
    assert build_algorithm(AlgorithmConfig(name="flexlora")).refactorizes
    assert build_algorithm(AlgorithmConfig(name="calibrated_flexlora")).refactorizes
    ways = {"off": (TOP.model_copy(update={"error_feedback": False}), False), "as it was": (TOP, False), "carried": (TOP, True)}
    found = {way: [federated("flexlora", *settings, seed) for seed in range(4)] for way, settings in ways.items()}
    whole = np.mean([federated("flexlora", CompressionConfig(), False, seed)[0] for seed in range(4)])
    loss = {way: float(np.mean([end for end, _ in ends]) - whole) for way, ends in found.items()}
    cosine = {way: float(np.mean([value for _, value in ends])) for way, ends in found.items()}
    assert cosine["as it was"] < 0.7
    assert cosine["carried"] > 0.9
    assert loss["carried"] < 0.8 * loss["as it was"] < loss["off"]


@pytest.mark.parametrize("name", ["fedavg", "flexlora"])
def test_an_update_that_is_not_finite_leaves_no_residual(name: str) -> None:
    """It has no directions. The server refuses it, and the client keeps no residual of it."""
    start = {A: torch.randn(4, 20), B: torch.randn(24, 4)}
    method = build_algorithm(AlgorithmConfig(name=name))
    first, kept = send(method, TOP, ClientUpdate("c", start, 1), {}, start)
    bad = {**start, A: start[A] * math.nan}
    sent, slots = send(method, TOP, ClientUpdate("c", bad, 1), kept, bad)
    assert W.is_finite(first.update)
    assert not W.is_finite(sent.update)
    assert slots == {}
