"""Products with frozen matrices through oneDNN, compared with float64 and with PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmllm import weights as W
from fedmllm.data.federated import FederatedData
from fedmllm.models.frozen_products import adapted, available, direct
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import attach_lora, read_weights
from fedmllm.models.parts import LoraConfig
from fedmllm.models.settings import ModelConfig
from fedmllm.training.batches import Encoder
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_in_parallel, train_locally
from fedmllm.training.rules import LocalResult, LocalRule
from fedmllm.training.settings import TrainingConfig

RNG = torch.Generator().manual_seed(0)

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch is built without oneDNN")


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RNG)


def frozen(inputs: int, outputs: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """A frozen layer through oneDNN, and the same layer in float64."""
    layer, exact = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False), nn.Linear(inputs, outputs, bias=bias)
    exact.load_state_dict(layer.state_dict())
    direct(layer)
    return layer, exact.double().requires_grad_(False)


def backward_node(product: Tensor) -> str:
    assert product.grad_fn is not None
    return type(product.grad_fn).__name__


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40,), (2, 31), (3, 2, 7)])
def test_a_frozen_layer_and_its_gradient_equal_float64(shape: tuple[int, ...], bias: bool) -> None:
    layer, exact = frozen(24, 10, bias)
    x, gradient = random(*shape, 24), random(*shape, 10)
    own, other = x.clone().requires_grad_(), x.double().requires_grad_()
    y, reference = layer(own), exact(other)
    y.backward(gradient)
    reference.backward(gradient.double())
    assert backward_node(y) == "_ProductBackward"
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_rows_that_are_not_contiguous_are_read_correctly() -> None:
    layer, exact = frozen(24, 10, True)
    x = random(24, 40).t()
    torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("untrained", ["", "a", "b", "x"])
def test_an_adapted_layer_and_its_gradients_equal_the_formula(untrained: str, bias: bool) -> None:
    """y_i = W x_i + bias + s B_k A_k x_i for two groups of three rows, computed row by row in float64."""
    layer, exact = frozen(24, 10, bias)
    start = {"x": random(6, 9, 24), "a": random(2, 4, 24), "b": random(2, 10, 4)}
    gradient = random(6, 9, 10)
    own = {name: tensor.clone().requires_grad_(name != untrained) for name, tensor in start.items()}
    other = {name: tensor.double().requires_grad_(name != untrained) for name, tensor in start.items()}
    y = adapted(layer, own["x"], own["a"], own["b"], 1.5)
    assert y is not None
    rows = [exact(x) + 1.5 * (other["b"][i // 3] @ other["a"][i // 3] @ x.T).T for i, x in enumerate(other["x"])]
    reference = torch.stack(rows)
    y.backward(gradient)
    reference.backward(gradient.double())
    torch.testing.assert_close(y.double(), reference, rtol=1e-4, atol=1e-4)
    for name, tensor in own.items():
        if name == untrained:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad.double(), other[name].grad, rtol=1e-4, atol=1e-4)


def test_trained_or_non_float32_layers_are_left_to_pytorch() -> None:
    layer, _ = frozen(24, 10, True)
    x = random(40, 24)
    few = x[:15].requires_grad_()
    assert torch.equal(layer(few), F.linear(few, layer.weight, layer.bias))
    assert backward_node(layer(few)) == "AddmmBackward0"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert adapted(layer, x[None], random(1, 4, 24), random(1, 10, 4), 1.0) is None
    assert adapted(layer, x[None], random(1, 4, 24).double(), random(1, 10, 4), 1.0) is None
    assert adapted(nn.Linear(24, 10), x[None], random(1, 4, 24), random(1, 10, 4), 1.0) is None
    layer.weight.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))


def loaded(onednn: bool) -> VisionLanguageModel:
    return attach_lora(load_model(ModelConfig(onednn=onednn), torch.device("cpu")), LoraConfig(), seed=0)


def trained(vlm: VisionLanguageModel, federation: FederatedData, parallel: bool) -> list[LocalResult]:
    encoder, start = Encoder(vlm, "agnostic"), read_weights(vlm.model)
    # Six and five samples, so that in the second step the clients have different numbers of rows.
    held = [[encoder(sample) for sample in samples[:n]] for samples, n in zip(federation.clients.values(), (6, 5), strict=False)]
    tasks = [(LocalTask(str(k), 0, 0, samples, start, 1e-3), LocalRule()) for k, samples in enumerate(held)]
    if parallel:
        return train_in_parallel(vlm, tasks, TrainingConfig(batch_size=3))
    return [train_locally(vlm, task, rule, TrainingConfig(batch_size=3)) for task, rule in tasks]


@pytest.mark.parametrize("parallel", [False, True])
def test_training_is_the_same_with_and_without_onednn(parallel: bool, federation: FederatedData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmllm.models.load.available", lambda: True)
    without = trained(loaded(False), federation, parallel)
    for a, b in zip(trained(loaded(True), federation, parallel), without, strict=True):
        assert W.norm(W.subtract(a.weights, b.weights)) < 0.02 * W.norm(W.subtract(b.weights, b.received))
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-4)


def test_onednn_is_used_where_it_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(onednn: bool) -> bool:
        model = load_model(ModelConfig(onednn=onednn), torch.device("cpu")).model
        return any("forward" in vars(module) for module in model.modules())

    assert changed(True) == available()
    monkeypatch.setattr("fedmllm.models.load.available", lambda: True)
    assert changed(True)
    assert not changed(False)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert not available()
