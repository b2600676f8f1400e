"""The local training loop. There is no other: methods change it through a ``LocalRule``, which is data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedmllm.models.encoding import Encoded, answer_nll
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights, trainable, write_weights
from fedmllm.randomness import generator, torch_randomness
from fedmllm.training.batches import Step, passes, steps
from fedmllm.types import Metrics, Weights


class TrainingConfig(BaseModel):
    """How a client trains between two exchanges."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    local_epochs: int = Field(1, ge=0)
    """Passes over the client's samples per round; 0 sends back a zero update."""
    batch_size: int = Field(4, gt=0)
    """Samples per micro-batch."""
    accumulation: int = Field(1, gt=0)
    """Micro-batches per optimizer step."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW's step size in the first round."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes over the rounds; it is constant within a round."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the gradient's mean."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay of the gradient's square."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of a step's gradient over all tensors; null for none."""
    max_batch_tokens: int = Field(8192, gt=0)
    """Padded tokens of one forward pass; the micro-batches of a step run as one batch as far as they fit."""


Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class LocalRule:
    """How a method departs from plain local training. The neutral values are FedAvg.

    Attributes:
        penalty: added to every step's loss: (current parameters, global weights) -> scalar.
        edit_gradient: replaces a gradient before clipping: (name, gradient) -> gradient.
    """

    penalty: Callable[[Parameters, Parameters], Tensor] | None = None
    edit_gradient: Callable[[str, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class LocalResult:
    """Weights after local training, and what was seen on the way: ``loss``, the mean over steps in nats per token."""

    weights: Weights
    metrics: Metrics


@dataclass(frozen=True)
class LocalTask:
    """One client's turn.

    Attributes:
        client, round_num, seed: name the turn; all its random numbers derive from them.
        samples: encoded, in an order that is the same wherever the client runs.
        start: the global weights.
        learning_rate: this round's.
    """

    client: str
    round_num: int
    seed: int
    samples: Sequence[Encoded]
    start: Weights
    learning_rate: float


def round_learning_rate(config: TrainingConfig, round_num: int, num_rounds: int) -> float:
    """``lr * (1 + cos(pi * round_num / num_rounds)) / 2``: full in round 0, near zero in the last; or constant."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * round_num / num_rounds))


def train_locally(vlm: VisionLanguageModel, task: LocalTask, rule: LocalRule, config: TrainingConfig) -> LocalResult:
    """Train the adapters on one client's samples from the global weights, with a fresh AdamW.

    A step minimizes the accumulated mean negative log-likelihood of the answer tokens plus the rule's penalty.
    """
    write_weights(vlm.model, task.start)
    if config.local_epochs == 0:
        return LocalResult(dict(task.start), {})
    parameters = dict(trainable(vlm.model))
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=task.learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    anchor = {name: tensor.to(vlm.device) for name, tensor in task.start.items()}
    losses = []
    vlm.model.train()
    with torch_randomness(vlm.device, task.seed, "dropout", task.round_num, task.client):
        for epoch in range(config.local_epochs):
            rng = generator(task.seed, "order", task.round_num, task.client, epoch)
            for step in steps(task.samples, config.batch_size, config.accumulation, rng):
                losses.append(_backward(vlm, step, rule, parameters, anchor, config.max_batch_tokens))
                _clip(parameters, config.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    vlm.model.eval()
    return LocalResult(read_weights(vlm.model), {"loss": sum(losses) / len(losses), "steps": float(len(losses))})


def _backward(vlm: VisionLanguageModel, step: Step, rule: LocalRule, parameters: Parameters, anchor: Parameters, max_tokens: int) -> float:
    """Leave the step's gradient in the parameters; return its loss without the penalty."""
    total = 0.0
    for batch, weights in passes(vlm, step, max_tokens):
        with vlm.autocast():
            loss = (answer_nll(vlm, batch) * weights).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    if rule.penalty is not None:
        rule.penalty(parameters, anchor).backward()  # type: ignore[no-untyped-call]
    if rule.edit_gradient is not None:
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                parameter.grad = rule.edit_gradient(name, parameter.grad)
    return total


def _clip(parameters: Parameters, clip_norm: float | None) -> None:
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), clip_norm)
