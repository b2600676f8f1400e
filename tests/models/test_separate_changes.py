"""Changes that methods add to the frozen weights of a bfloat16 model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmllm import factors
from fedmllm.algorithms import AlgorithmConfig, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.engine.base import Split
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.rounds import Loop, run_stage
from fedmllm.engine.stages import Stage
from fedmllm.errors import ConfigError
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import adapted_layers, attach_lora, detach_lora, frozen_weights, lora_scale, read_weights, write_base
from fedmllm.models.parallel_adapters import parallel_adapters, stacked
from fedmllm.models.parts import LoraConfig
from fedmllm.models.saved import load_adapter, save_adapter, save_merged
from fedmllm.models.settings import ModelConfig
from fedmllm.training.batches import Encoder
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Weights

SMALL = 1e-4
"""Half of bfloat16's spacing at 0.05, the size of the embedded model's weights."""


def bfloat16_model(**settings: bool) -> VisionLanguageModel:
    return attach_lora(load_model(ModelConfig(dtype="bfloat16"), torch.device("cpu")), LoraConfig(**settings), 0)  # type: ignore[arg-type]


def change(vlm: VisionLanguageModel, size: float = SMALL) -> Weights:
    generator = torch.Generator().manual_seed(1)
    return {name: size * torch.randn(w.shape, generator=generator) / lora_scale(vlm.model) for name, w in frozen_weights(vlm).items()}


def single_client(vlm: VisionLanguageModel, x: Tensor) -> Tensor:
    """The first adapted layer's output through PEFT."""
    with torch.no_grad(), vlm.autocast():
        return next(adapted_layers(vlm.model))[1](x)  # type: ignore[no-any-return]


def parallel_clients(vlm: VisionLanguageModel, x: Tensor) -> Tensor:
    """The same output for two parallel clients."""
    with torch.no_grad(), parallel_adapters(vlm.model) as layers, vlm.autocast(), stacked(layers, [read_weights(vlm.model)] * 2, [1, 1]):
        return next(iter(layers.values()))(x.unflatten(0, (2, -1))).flatten(0, 1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [single_client, parallel_clients])
def test_a_small_change_reaches_what_a_layer_computes(forward: Callable[[VisionLanguageModel, Tensor], Tensor]) -> None:
    """Least squares over 65,536 inputs recovers the change from the outputs and averages their rounding away.

    The remaining rounding is 7 % of the change and has no direction: along the change nothing is lost. Merged into the matrix,
    a third of the change was lost, and rounding added 72 % of it.
    """
    vlm = bfloat16_model()
    name, layer = next(adapted_layers(vlm.model))
    x = torch.randn(2**16, layer.in_features, generator=torch.Generator().manual_seed(2)).bfloat16()
    before = forward(vlm, x).float()
    base = change(vlm)
    write_base(vlm, base)
    moved = forward(vlm, x).float() - before
    found = torch.linalg.lstsq(x.float(), moved).solution.T
    expected = lora_scale(vlm.model) * base[name]
    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert float((found * expected).sum() / expected.square().sum()) == pytest.approx(1, abs=0.01)


def test_the_change_is_stored_to_sixteen_bits_beside_the_matrix() -> None:
    vlm = bfloat16_model()
    loaded = {name: tensor.clone() for name, tensor in frozen_weights(vlm).items()}
    base = change(vlm)
    for factor in (1.0, -3.0):
        write_base(vlm, {name: factor * tensor for name, tensor in base.items()})
        for name, tensor in base.items():
            held = vlm.beside[name].high.double() + vlm.beside[name].low.double()
            torch.testing.assert_close(held, factor * lora_scale(vlm.model) * tensor.double(), rtol=2**-16, atol=0)
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in frozen_weights(vlm).items())


def test_a_change_can_be_removed_completely() -> None:
    vlm = bfloat16_model()
    x = torch.randn(4, next(adapted_layers(vlm.model))[1].in_features).bfloat16()
    frozen = [layer.get_base_layer() for _, layer in adapted_layers(vlm.model)]
    before, forwards = single_client(vlm, x), [vars(layer).get("forward") for layer in frozen]
    write_base(vlm, change(vlm, 1.0))
    assert not torch.equal(single_client(vlm, x), before)
    write_base(vlm, {})
    assert torch.equal(single_client(vlm, x), before)
    write_base(vlm, change(vlm, 1.0))
    detach_lora(vlm)
    assert not vlm.beside
    assert [vars(layer).get("forward") for layer in frozen] == forwards


def test_gradients_pass_through_the_change() -> None:
    """The gradient of a layer's input equals a float64 computation from the rounded matrices, to bfloat16's precision."""
    vlm = bfloat16_model()
    write_base(vlm, change(vlm, 0.05))
    name, layer = next(adapted_layers(vlm.model))
    x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
    with vlm.autocast():
        layer(x).float().sum().backward()
    assert x.grad is not None
    whole = layer.get_base_layer().weight.double() + vlm.beside[name].high.double() + vlm.beside[name].low.double()
    torch.testing.assert_close(x.grad.double(), whole.sum(0).expand(64, -1), rtol=0.02, atol=0.02)


def test_a_float32_matrix_is_changed_in_place(vlm: VisionLanguageModel) -> None:
    """Bit for bit: the original plus s times the change, added in float32."""
    loaded = {name: tensor.clone() for name, tensor in frozen_weights(vlm).items()}
    base = change(vlm)
    write_base(vlm, base)
    assert not vlm.beside
    for name, layer in adapted_layers(vlm.model):
        assert torch.equal(layer.get_base_layer().weight, loaded[name] + lora_scale(vlm.model) * base[name])


@pytest.mark.parametrize("name", ["flora", "fedex_lora", "yoco"])
def test_merged_changes_reach_the_model_and_the_adapter(name: str, federation: FederatedData, tmp_path: Path) -> None:
    """After a round of two clients, the next round's model holds the state's whole change, and the saved adapter everything."""
    vlm = bfloat16_model()
    algorithm, training = build_algorithm(AlgorithmConfig(name=name)), TrainingConfig()
    clients = {client: samples[:1] for client, samples in list(federation.clients.items())[:2]}
    loop = Loop(
        algorithm,
        InProcessEngine(vlm, Encoder(vlm, "agnostic"), training),
        training,
        Split(lambda w, b: {"score": 0.0}),
        RunStore(tmp_path),
        0,
    )
    state = run_stage(loop, Stage("federated", clients, 1, 2), algorithm.init(read_weights(vlm.model), frozen_weights(vlm)))
    write_base(vlm, state.base)
    for module, tensor in state.base.items():
        held = vlm.beside[module].high.double() + vlm.beside[module].low.double()
        expected = lora_scale(vlm.model) * tensor.double()
        assert float((held - expected).norm()) <= 2**-16 * float(expected.norm())
    save_adapter(vlm, state.weights, tmp_path / "adapter", state.base)
    again = load_adapter(load_model(ModelConfig(dtype="bfloat16"), torch.device("cpu")), tmp_path / "adapter")
    for module, layer in adapted_layers(again.model):
        expected = lora_scale(vlm.model) * (state.base[module].double() + factors.products(state.weights)[module])
        assert float((layer.get_delta_weight("default") - expected).norm()) <= 1e-4 * float(expected.norm())


def test_dora_with_a_bfloat16_model_is_refused_for_methods_that_change_frozen_weights() -> None:
    values = {"algorithm": {"name": "flora"}, "lora": {"dora": True}}
    Experiment.parse(values)
    with pytest.raises(
        ConfigError,
        match=r"lora\.dora: flora adds to the frozen weights, which bfloat16 cannot hold exactly, but DoRA needs their exact norms",
    ):
        Experiment.parse({**values, "model": {"dtype": "bfloat16"}})
    Experiment.parse({"lora": {"dora": True}, "model": {"dtype": "bfloat16"}})


@pytest.mark.parametrize("settings", [{}, {"dora": True}])
def test_merging_reports_the_loss_of_precision(settings: dict[str, bool], tmp_path: Path) -> None:
    """Compared with the change added in float64 by hand. In float32 almost nothing is lost."""
    vlm = bfloat16_model(**settings)
    for _, layer in adapted_layers(vlm.model):
        torch.nn.init.constant_(layer.lora_B["default"].weight, SMALL)
    layer = next(adapted_layers(vlm.model))[1]
    frozen = layer.get_base_layer()
    before, delta = frozen.weight.double(), layer.get_delta_weight("default").double()
    lost = save_merged(vlm, tmp_path / "coarse")
    assert 0.1 < lost < 1
    if not settings:
        torch.testing.assert_close(frozen.weight.detach(), (before + delta).bfloat16(), rtol=2**-8, atol=0)
    fine = attach_lora(load_model(ModelConfig(), torch.device("cpu")), LoraConfig(**settings), 0)  # type: ignore[arg-type]
    for _, layer in adapted_layers(fine.model):
        torch.nn.init.constant_(layer.lora_B["default"].weight, SMALL)
    assert save_merged(fine, tmp_path / "fine") < 1e-3
