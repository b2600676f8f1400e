"""The state of one client's training: its steps, what a rule changes in them, and its result."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from fedmllm import weights as W
from fedmllm.algorithms.fedprox import Proximal
from fedmllm.data.federated import FederatedData
from fedmllm.models.encoding import Encoded
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import copies, read_weights, trainable
from fedmllm.training.batches import Encoder
from fedmllm.training.client import ClientTraining, LocalTask
from fedmllm.training.local import train_in_parallel, train_locally
from fedmllm.training.rules import LocalRule
from fedmllm.training.schedule import ScheduleConfig
from fedmllm.training.settings import TrainingConfig


@pytest.fixture
def samples(federation: FederatedData, encoder: Encoder) -> list[Encoded]:
    return [encoder(sample) for sample in federation.clients["client-00"][:5]]


@pytest.fixture
def task(vlm: VisionLanguageModel, samples: list[Encoded]) -> LocalTask:
    return LocalTask("client-00", 3, 0, samples, read_weights(vlm.model), learning_rate=1e-3)


def started(vlm: VisionLanguageModel, task: LocalTask, rule: LocalRule, config: TrainingConfig) -> ClientTraining:
    """The state before the first step; all adapters train."""
    weights = {name: tensor.requires_grad_() for name, tensor in copies(dict(trainable(vlm.model)), task.received).items()}
    return ClientTraining(vlm, task, rule, config, weights)


def order(training: ClientTraining) -> list[int]:
    """The samples by identity, in the order of the steps."""
    return [id(sample) for step in training.plan for sample in step.samples]


def test_every_epoch_visits_each_sample_once_in_an_order_of_client_round_and_seed(vlm: VisionLanguageModel, task: LocalTask) -> None:
    config = TrainingConfig(batch_size=2, local_epochs=2)
    first = order(started(vlm, task, LocalRule(), config))
    epochs = first[:5], first[5:]
    assert all(Counter(epoch) == Counter(map(id, task.samples)) for epoch in epochs)
    others = [replace(task, client="client-01"), replace(task, round_num=4), replace(task, seed=1)]
    found = [order(started(vlm, other, LocalRule(), config)) for other in (task, *others)]
    assert found[0] == first
    assert len({tuple(row) for row in [epochs[0], epochs[1], *(row[:5] for row in found[1:])]}) == 5
    assert [len(step.samples) for step in started(vlm, task, LocalRule(), config).plan] == [2, 2, 1] * 2


def test_the_longest_sample_is_the_one_with_the_most_tokens(vlm: VisionLanguageModel, task: LocalTask, samples: list[Encoded]) -> None:
    training = started(vlm, task, LocalRule(), TrainingConfig())
    assert training.longest is not None
    assert len(training.longest.input_ids) == max(len(sample.input_ids) for sample in samples)
    assert started(vlm, replace(task, samples=()), LocalRule(), TrainingConfig()).longest is None


def test_a_client_without_samples_takes_no_step_and_reports_no_loss(vlm: VisionLanguageModel, task: LocalTask) -> None:
    empty = replace(task, samples=())
    result = started(vlm, empty, LocalRule(records_gradient=True), TrainingConfig()).result(task.received)
    assert (result.metrics, result.gradient) == ({"steps": 0.0}, {})
    assert result.weights is result.received is task.received


def test_the_recorded_gradient_is_the_mean_over_steps_before_edits_and_clipping(vlm: VisionLanguageModel, task: LocalTask) -> None:
    """Three steps with gradients of 1, 2 and 3 everywhere, which the rule negates and the settings clip."""
    seen: list[float] = []

    def negated(name: str, gradient: torch.Tensor) -> torch.Tensor:
        seen.append(float(gradient.flatten()[0]))
        return -gradient

    training = started(vlm, task, LocalRule(records_gradient=True, edit_gradient=negated), TrainingConfig(batch_size=2, clip_norm=1e-3))
    before = {name: tensor.detach().clone() for name, tensor in training.weights.items()}
    for position in range(3):
        for tensor in training.weights.values():
            tensor.grad = torch.full_like(tensor, position + 1.0)
        training.update(position)
        assert all(tensor.grad is None for tensor in training.weights.values())
    gradient = training.result(training.weights).gradient
    assert gradient.keys() == before.keys()
    assert all(torch.equal(tensor, torch.full_like(tensor, 2.0)) for tensor in gradient.values())
    assert set(seen) == {1.0, 2.0, 3.0}
    # A descent along the negated gradient goes up.
    assert all((tensor > before[name]).all() for name, tensor in training.weights.items())


def test_forgotten_gradients_do_not_move_the_weights(vlm: VisionLanguageModel, task: LocalTask) -> None:
    training = started(vlm, task, LocalRule(), TrainingConfig(batch_size=2))
    for tensor in training.weights.values():
        tensor.grad = torch.ones_like(tensor)
    training.forget()
    training.update(0)
    assert all(torch.equal(tensor, task.received[name]) for name, tensor in training.weights.items())


def test_steps_follow_the_schedule(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    """The first AdamW step moves every entry that has a gradient by the rate, here half of it during warmup, for single and parallel clients."""
    samples = [encoder(sample) for sample in federation.clients["client-00"][:2]]
    task = LocalTask("a", 0, 0, samples, read_weights(vlm.model), 1e-3)
    moved = {}
    for name, schedule in (("half", ScheduleConfig(over="steps", warmup=0.99)), ("whole", ScheduleConfig())):
        config = TrainingConfig(batch_size=1, local_epochs=1, schedule=schedule)
        results = [
            train_locally(vlm, task, LocalRule(), config),
            train_in_parallel(vlm, [(task, LocalRule()), (task, LocalRule())], config)[0],
        ]
        moved[name] = [W.norm(W.subtract(result.weights, task.received)) for result in results]
    for half, whole in zip(moved["half"], moved["whole"], strict=True):
        assert 0.6 < half / whole < 0.9


def test_penalties_and_gradient_edits_take_effect(vlm: VisionLanguageModel, task: LocalTask) -> None:
    config = TrainingConfig()
    free = train_locally(vlm, task, LocalRule(), config).weights
    pulled = LocalRule(terms=(Proximal(2e3),))
    tight = train_locally(vlm, task, pulled, config).weights
    assert W.norm(W.subtract(tight, task.received)) < 0.8 * W.norm(W.subtract(free, task.received))
    frozen = LocalRule(edit_gradient=lambda name, gradient: gradient * ("lora_A" not in name))
    moved = train_locally(vlm, task, frozen, config).weights
    assert all(torch.equal(moved[name], task.received[name]) == ("lora_A" in name) for name in moved)
