"""Parallel clients, in one thread and in two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fedmllm import weights as W
from fedmllm.data.federated import FederatedData
from fedmllm.errors import ModelError
from fedmllm.models.last_layer import shorten
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import adapted_layers, has_dropout, read_weights
from fedmllm.training.batches import Encoder
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_in_parallel, train_locally
from fedmllm.training.rules import LocalResult, LocalRule
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Weights

Turns = list[tuple[LocalTask, LocalRule]]


@pytest.fixture
def tasks(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> Turns:
    """Three clients with 5, 2 and 3 samples."""
    start = read_weights(vlm.model)
    held = {
        name: [encoder(sample) for sample in samples[:count]]
        for (name, samples), count in zip(federation.clients.items(), (5, 2, 3), strict=True)
    }
    return [(LocalTask(name, 0, 0, samples, start, 1e-3), LocalRule()) for name, samples in held.items()]


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def relative_distance(a: LocalResult, b: LocalResult, start: Weights) -> float:
    return W.norm(W.subtract(a.weights, b.weights)) / W.norm(W.subtract(a.weights, start))


CONFIG = TrainingConfig(batch_size=2)


def test_parallel_clients_train_as_one_by_one_in_float32(vlm: VisionLanguageModel, tasks: Turns) -> None:
    singly = [train_locally(vlm, task, rule, CONFIG) for task, rule in tasks]
    for alone, together in zip(singly, train_in_parallel(vlm, tasks, CONFIG), strict=True):
        assert relative_distance(alone, together, tasks[0][0].received) < 0.02
        assert together.metrics["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-4)
        assert together.metrics["steps"] == alone.metrics["steps"]


def test_parallel_clients_train_the_same_with_a_shortened_last_layer(vlm: VisionLanguageModel, tasks: Turns) -> None:
    whole = train_in_parallel(vlm, tasks, CONFIG)
    assert shorten(vlm.model)
    for one, other in zip(whole, train_in_parallel(vlm, tasks, CONFIG), strict=True):
        assert relative_distance(one, other, tasks[0][0].received) < 0.02


@pytest.mark.usefixtures("two_threads")
def test_two_threads_are_reproducible_bit_for_bit(vlm: VisionLanguageModel, tasks: Turns) -> None:
    first, second = (train_in_parallel(vlm, tasks, CONFIG) for _ in range(2))
    for a, b, (task, rule) in zip(first, second, tasks, strict=True):
        assert all(torch.equal(a.weights[name], tensor) for name, tensor in b.weights.items())
        assert relative_distance(a, train_locally(vlm, task, rule, CONFIG), task.received) < 0.02
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("sizes", "threads"), [((4, 4), 2), ((6, 2, 2, 2), 2), ((9, 1), 1), ((5, 2, 2, 2), 2), ((8, 1, 1), 1)])
def test_work_is_split_over_threads_unless_one_client_dominates(
    sizes: tuple[int, ...],
    threads: int,
    vlm: VisionLanguageModel,
    encoder: Encoder,
    federation: FederatedData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two threads are faster if the larger one has at most two thirds of the work: 1 / (2 * 0.75)."""
    group_sizes: list[int] = []
    monkeypatch.setattr("fedmllm.training.local._train", lambda vlm, group, *rest: group_sizes.append(len(group)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    sample, start = encoder(federation.clients["client-00"][0]), read_weights(vlm.model)
    train_in_parallel(vlm, [(LocalTask(str(k), 0, 0, [sample] * size, start, 1e-3), LocalRule()) for k, size in enumerate(sizes)], CONFIG)
    assert len(group_sizes) == threads
    assert sum(group_sizes) == len(sizes)


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_is_raised_and_leaves_the_model_unchanged(vlm: VisionLanguageModel, tasks: Turns) -> None:
    def broken(name: str, gradient: torch.Tensor) -> torch.Tensor:
        raise ValueError("a rule of its own")

    before = read_weights(vlm.model)
    with pytest.raises(ValueError, match="a rule of its own"):
        train_in_parallel(vlm, [(task, LocalRule(edit_gradient=broken)) for task, _ in tasks], CONFIG)
    assert torch.get_num_threads() == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_weights(vlm.model).items())
    for _, layer in adapted_layers(vlm.model):
        assert "forward" not in vars(layer)
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in vlm.model.parameters())


def test_the_models_own_adapter_has_no_effect(vlm: VisionLanguageModel, tasks: Turns) -> None:
    first = train_in_parallel(vlm, tasks, CONFIG)
    with torch.no_grad():
        for _, layer in adapted_layers(vlm.model):
            layer.lora_B["default"].weight.fill_(1.0)
    second = train_in_parallel(vlm, tasks, CONFIG)
    assert all(torch.equal(a.weights[name], b.weights[name]) for a, b in zip(first, second, strict=True) for name in a.weights)


def test_the_order_of_tensors_has_no_effect(vlm: VisionLanguageModel, tasks: Turns) -> None:
    """A checkpoint returns tensors in another order. Sums over tensors, such as in clipping, must not depend on it."""
    first = train_in_parallel(vlm, tasks, CONFIG)
    reordered = [(replace(task, received=dict(reversed(task.received.items()))), rule) for task, rule in tasks]
    for a, b in zip(first, train_in_parallel(vlm, reordered, CONFIG), strict=True):
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_weights_that_do_not_fit_are_refused(vlm: VisionLanguageModel, tasks: Turns) -> None:
    (task, rule), other, _ = tasks
    missing = dict(list(task.received.items())[1:])
    with pytest.raises(ModelError, match="1 tensors are missing"):
        train_in_parallel(vlm, [(replace(task, received=missing), rule), other], CONFIG)


def test_tensors_that_do_not_train_do_not_change(vlm: VisionLanguageModel, tasks: Turns) -> None:
    rule = LocalRule(trains=lambda name: "lora_B" in name)
    for result in train_in_parallel(vlm, [(task, rule) for task, _ in tasks], CONFIG):
        moved = {name.split(".")[-2] for name, tensor in result.weights.items() if not torch.equal(tensor, result.received[name])}
        assert moved == {"lora_B"}


def test_dropout_is_detected(base: VisionLanguageModel, vlm: VisionLanguageModel) -> None:
    assert not has_dropout(vlm.model)
    assert has_dropout(torch.nn.Sequential(torch.nn.Dropout(0.1)))
    assert not has_dropout(torch.nn.Sequential(torch.nn.Dropout(0.0)))
