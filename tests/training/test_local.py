"""The local training loop, compared with a plain loop written here, and its invariants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedmllm import weights as W
from fedmllm.data.federated import FederatedData
from fedmllm.models.encoding import Encoded, collate
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import attach_lora, read_weights, write_weights
from fedmllm.models.parts import LoraConfig
from fedmllm.models.settings import ModelConfig
from fedmllm.randomness import generator
from fedmllm.training.batches import Encoder
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_locally
from fedmllm.training.rules import LocalRule
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Weights

NO_TERMS = LocalRule()


@pytest.fixture
def samples(federation: FederatedData, encoder: Encoder) -> list[Encoded]:
    client = max(federation.clients.values(), key=len)
    return [encoder(sample) for sample in client[:10]]


@pytest.fixture
def task(vlm: VisionLanguageModel, samples: list[Encoded]) -> LocalTask:
    return LocalTask("client-00", 3, 0, samples, read_weights(vlm.model), learning_rate=1e-3)


@pytest.fixture
def exact(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """The model in float64. Adam divides by the gradient's size, so rounding noise in a tiny gradient makes a full step."""
    vlm.model.double()
    return vlm


def relative_distance(a: Weights, b: Weights, start: Weights) -> float:
    """The distance of two results relative to how far training moved the weights."""
    return W.norm(W.subtract(a, b)) / W.norm(W.subtract(a, start))


def largest_change(a: Weights, b: Weights) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def plain_loop(vlm: VisionLanguageModel, task: LocalTask, config: TrainingConfig) -> Weights:
    """An independent loop: Transformers' loss on labels, micro-batches one by one, textbook accumulation."""
    write_weights(vlm.model, task.received)
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    order = generator(task.seed, "order", task.round_num, task.client, 0).permutation(len(task.samples))
    micro = [order[k : k + config.batch_size] for k in range(0, len(order), config.batch_size)]
    for first in range(0, len(micro), config.accumulation):
        group = micro[first : first + config.accumulation]
        for part in group:
            batch = collate(vlm, [task.samples[i] for i in part])
            labels = torch.full_like(batch.inputs["input_ids"], -100)
            for row, i in enumerate(part):
                labels[row, -task.samples[i].answer_length :] = task.samples[i].answer_ids
            (vlm.model(**batch.inputs, labels=labels).loss / len(group)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return read_weights(vlm.model)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (2, 3), (1, 4)])
def test_equals_a_plain_loop(exact: VisionLanguageModel, task: LocalTask, batch_size: int, accumulation: int) -> None:
    config = TrainingConfig(batch_size=batch_size, accumulation=accumulation, weight_decay=0.1)
    ours = train_locally(exact, task, NO_TERMS, config).weights
    assert largest_change(ours, task.received) > 1e-4
    # One entry with a step of the wrong sign gives 0.003; another order of the samples gives at least 0.2.
    assert relative_distance(ours, plain_loop(exact, task, config), task.received) < 0.02
    assert relative_distance(ours, plain_loop(exact, replace(task, round_num=4), config), task.received) > 0.1


def test_one_padded_batch_equals_micro_batches_one_by_one(exact: VisionLanguageModel, task: LocalTask) -> None:
    padded = train_locally(exact, task, NO_TERMS, TrainingConfig(batch_size=1, accumulation=4))
    singly = train_locally(exact, task, NO_TERMS, TrainingConfig(batch_size=1, accumulation=4, max_batch_tokens=1))
    assert padded.metrics["steps"] == singly.metrics["steps"] == 3
    assert padded.metrics["loss"] == pytest.approx(singly.metrics["loss"], abs=1e-4)
    assert relative_distance(padded.weights, singly.weights, task.received) < 1e-3


def test_no_epochs_change_no_bit(vlm: VisionLanguageModel, task: LocalTask) -> None:
    result = train_locally(vlm, task, NO_TERMS, TrainingConfig(local_epochs=0))
    assert all(torch.equal(result.weights[name], task.received[name]) for name in task.received)


def test_training_repeats_bit_for_bit_after_other_training(vlm: VisionLanguageModel, task: LocalTask) -> None:
    config = TrainingConfig()
    first = train_locally(vlm, task, NO_TERMS, config).weights
    torch.rand(7)
    train_locally(vlm, replace(task, client="client-01"), NO_TERMS, config)
    assert largest_change(first, train_locally(vlm, task, NO_TERMS, config).weights) == 0


def test_dropout_is_seeded_by_client_and_round(federation: FederatedData) -> None:
    vlm = attach_lora(load_model(ModelConfig(), torch.device("cpu")), LoraConfig(dropout=0.3), 0)
    encoder = Encoder(vlm, "agnostic")
    samples = [encoder(sample) for sample in next(iter(federation.clients.values()))[:1]]
    task = LocalTask("a", 0, 0, samples, read_weights(vlm.model), 1e-3)
    runs: list[Callable[[], LocalTask]] = [
        lambda: task,
        lambda: task,
        lambda: replace(task, client="b"),
        lambda: replace(task, round_num=1),
    ]
    first, again, client, later = (train_locally(vlm, run(), NO_TERMS, TrainingConfig(local_epochs=2)).weights for run in runs)
    assert largest_change(first, again) == 0
    assert largest_change(first, client) > 0
    assert largest_change(first, later) > 0


def test_the_frozen_model_does_not_move(vlm: VisionLanguageModel, task: LocalTask) -> None:
    before = {name: p.detach().clone() for name, p in vlm.model.named_parameters() if not p.requires_grad}
    train_locally(vlm, task, NO_TERMS, TrainingConfig())
    assert all(torch.equal(p, before[name]) for name, p in vlm.model.named_parameters() if name in before)


def test_bfloat16_base_trains_float32_adapters(federation: FederatedData) -> None:
    vlm = attach_lora(load_model(ModelConfig(dtype="bfloat16"), torch.device("cpu")), LoraConfig(), 0)
    encoder = Encoder(vlm, "agnostic")
    samples = [encoder(sample) for sample in next(iter(federation.clients.values()))[:6]]
    task = LocalTask("a", 0, 0, samples, read_weights(vlm.model), 1e-3)
    result = train_locally(vlm, task, NO_TERMS, TrainingConfig(local_epochs=3))
    assert W.is_finite(result.weights)
    assert largest_change(result.weights, task.received) > 1e-4
    assert all(parameter.dtype == torch.float32 for parameter in vlm.model.parameters() if parameter.requires_grad)
