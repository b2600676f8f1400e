"""Codecs by their own error bounds, and error feedback by what it is for."""

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

from fedmllm import train
from fedmllm import weights as W
from fedmllm.algorithms import AlgorithmConfig, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.compression import Codec, CompressionConfig, build_codec, sent_through
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.stages import Stage
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.training.batches import Encoder
from fedmllm.training.local import TrainingConfig

NAMES = ("bfloat16", "int8", "int4", "top_k")
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=40), elements=st.floats(-1e3, 1e3, width=32, allow_subnormal=False))


def codec(name: str, **settings: float) -> Codec:
    found = build_codec(CompressionConfig.model_validate({"name": name, **settings}))
    assert found is not None
    return found


def through(name: str, tensor: torch.Tensor, **settings: float) -> torch.Tensor:
    coder = codec(name, **settings)
    return coder.unpack(coder.pack(tensor), tensor.shape)


def test_nothing_is_the_default() -> None:
    assert build_codec(CompressionConfig()) is None


@given(ARRAYS)
def test_bfloat16_keeps_eight_bits(array: np.ndarray) -> None:
    np.testing.assert_allclose(through("bfloat16", torch.from_numpy(array)).numpy(), array, rtol=2**-8, atol=1e-37)


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7)])
@given(array=ARRAYS, block=st.integers(2, 64))
def test_blocks_are_within_half_a_step(name: str, largest: int, array: np.ndarray, block: int) -> None:
    """S may come out 2^-8 smaller than the maximum asks for: then the largest entry loses that part of itself."""
    flat = array.reshape(-1)
    padded = np.pad(flat, (0, -len(flat) % block)).reshape(-1, block)
    top = np.abs(padded).max(1, keepdims=True)
    bound = np.broadcast_to(top / largest / 2 * (1 + 2**-7) + top * 2**-8 + 1e-37, padded.shape).reshape(-1)[: len(flat)]
    error = np.abs(through(name, torch.from_numpy(array), block=block).numpy().reshape(-1) - flat)
    assert (error <= bound).all()


@given(ARRAYS, st.floats(0.01, 1))
def test_top_k_sends_the_largest(array: np.ndarray, fraction: float) -> None:
    flat, count = np.abs(array.reshape(-1)), math.ceil(fraction * array.size)
    found = through("top_k", torch.from_numpy(array), fraction=fraction).numpy().reshape(-1)
    least = np.sort(flat)[::-1][count - 1]
    assert (found != 0).sum() <= count
    np.testing.assert_allclose(np.sort(np.abs(found))[::-1][:count], np.sort(flat)[::-1][:count], rtol=2**-8, atol=1e-37)
    assert (flat[found != 0] >= least).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_so(name: str, value: float) -> None:
    tensor = torch.arange(300.0).reshape(3, 100)
    tensor[1, 7] = value
    assert not torch.isfinite(through(name, tensor)).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    assert float(through(name, torch.zeros(5, 7)).abs().max()) == 0


@pytest.mark.parametrize(("name", "size"), [("bfloat16", 2000), ("int8", 1016), ("int4", 516), ("top_k", 300)])
def test_bytes_by_hand(name: str, size: int) -> None:
    """1,000 entries: 2 bytes each; 1 byte and 8 scales of 2; half a byte and 8 scales; 50 positions of 4 and values of 2."""
    assert sent_through(codec(name), {"x": torch.randn(10, 100)}, {}).num_bytes == size


@pytest.mark.parametrize("name", ["int4", "top_k"])
def test_with_feedback_nothing_is_lost_in_the_long_run(name: str) -> None:
    """What has arrived after many rounds is what was sent, up to one round's loss; without feedback the loss adds up."""
    update, coder = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)), codec(name, fraction=0.1)
    arrived, alone, lost = torch.zeros(40, 50), torch.zeros(40, 50), {}
    for _ in range(50):
        received, lost, _ = sent_through(coder, {"x": update}, lost)
        arrived += received["x"]
        alone += sent_through(coder, {"x": update}, {})[0]["x"]
    assert torch.allclose(arrived + lost["x"], 50 * update, atol=1e-3)
    assert float((arrived - 50 * update).norm()) < 0.25 * float((alone - 50 * update).norm())


@pytest.mark.parametrize("name", ["fedavg", "rolora", "scaffold", "ditto"])
def test_what_clients_send_arrives_smaller_and_what_is_lost_stays_with_them(
    name: str, vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData, tmp_path: Path
) -> None:
    """Three rounds of two clients with two samples: 4 bits and a sixteenth of two bytes per entry, of what the method sends."""
    algorithm, training = build_algorithm(AlgorithmConfig(name=name)), TrainingConfig()
    clients = {client: list(itertools.islice(samples, 2)) for client, samples in itertools.islice(federation.clients.items(), 2)}
    ends, records = [], []
    for compression in (CompressionConfig(), CompressionConfig(name="int4")):
        store = RunStore(tmp_path / compression.name)
        engine = InProcessEngine(vlm, encoder, training)
        loop = Loop(algorithm, engine, training, lambda w, b: {"score": 0.0}, store, 0, compression=compression)
        start = read_weights(vlm.model)
        state = run_stage(loop, Stage("federated", clients, 3, 2), algorithm.init(start, frozen_weights(vlm)))
        ends.append(W.subtract(state.weights, start))
        records.append(store.records("federated"))
    for whole, small in zip(*records, strict=True):
        assert small["bytes_up"] == whole["bytes_up"] * (4 + 16 / 128) / 32
        assert not small["refused"]
    kept = RunStore(tmp_path / "int4").client_states("federated").load("client-00", state.accepted["client-00"])
    assert {kind for kind in kept if kind.startswith("lost_")} == {f"lost_{kind}" for kind in ("update", *algorithm.client_sends)}
    assert set(kept["lost_update"]) == set(ends[0])
    assert W.norm(kept["lost_update"]) > 0
    assert 0 < W.norm(W.subtract(*ends)) < W.norm(ends[0])


def test_the_baselines_send_theirs_as_they_are(tiny: Experiment, tmp_path: Path) -> None:
    values = tiny.model_dump(mode="json") | {"compression": {"name": "int8"}}
    train(Experiment.parse(values | {"evaluation": {"every": 0, "baselines": ["local"]}}), tmp_path / "run")
    store = RunStore(tmp_path / "run")
    federated, local = (store.records(stage)[0] for stage in ("federated", "local-client-00"))
    assert federated["bytes_up"] / len(federated["clients"]) == local["bytes_up"] * (8 + 16 / 128) / 32
