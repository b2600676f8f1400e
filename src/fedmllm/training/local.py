"""The local training loop. There is no other: methods change it through a ``LocalRule``, which is data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from fedmllm.models.encoding import Encoded, answer_nll
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights, trainable, training_only, write_weights
from fedmllm.randomness import generator, torch_randomness
from fedmllm.training.alignment import backward_alignment
from fedmllm.training.batches import Step, passes, steps
from fedmllm.types import Metrics, Slots, Weights


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

Penalty = Callable[[Parameters, Parameters, float], Tensor]
"""(current parameters, what the client received, progress through its turn in [0, 1)) -> scalar."""


@dataclass(frozen=True)
class LocalResult:
    """What local training came to.

    Attributes:
        weights: all tensors, those that did not train included.
        received: what the client was sent.
        metrics: ``loss``, the mean over steps in nats per token, and ``steps``; empty where no step was taken.
        gradient: mean over steps of the gradient before any edit or clipping; empty unless the rule asks for it.
    """

    weights: Weights
    received: Weights
    metrics: Metrics
    gradient: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Upload:
    """What a client makes of its result.

    Attributes:
        weights: what it calls its weights; the update is their difference to what it received.
        extras: further tensors for the server, named and shaped like the update.
        keeps: what it keeps for its next turn.
    """

    weights: Weights
    extras: Slots = field(default_factory=dict)
    keeps: Slots = field(default_factory=dict)


def plain_upload(result: LocalResult) -> Upload:
    """The result itself."""
    return Upload(result.weights)


@dataclass(frozen=True)
class LocalRule:
    """How a method departs from plain local training. The neutral values are FedAvg.

    Attributes:
        penalty: added to every step's loss.
        edit_gradient: replaces a gradient before clipping: (name, gradient) -> gradient.
        trains: which tensors train; all for None.
        start: tensors that begin elsewhere than at what the client received.
        records_gradient: whether ``LocalResult.gradient`` is wanted.
        alignment: weight of the loss that makes a complete sample and its copy with a modality less answer alike.
        calibration: strength of the calibration to the client's own labels (``training.calibration``).
        finish: result -> what is sent and kept.
        personal: a second pass over the same samples, whose weights the client keeps under ``personal``.
    """

    penalty: Penalty | None = None
    edit_gradient: Callable[[str, Tensor], Tensor] | None = None
    trains: Callable[[str], bool] | None = None
    start: Weights = field(default_factory=dict)
    records_gradient: bool = False
    alignment: float = 0.0
    calibration: float = 0.0
    finish: Callable[[LocalResult], Upload] = plain_upload
    personal: LocalRule | None = None

    def with_penalty(self, penalty: Penalty) -> LocalRule:
        """The same rule with one more penalty."""
        first = self.penalty
        if first is None:
            return replace(self, penalty=penalty)
        return replace(self, penalty=lambda now, received, progress: first(now, received, progress) + penalty(now, received, progress))


@dataclass(frozen=True)
class LocalTask:
    """One client's turn.

    Attributes:
        client, round_num, seed: name the turn; all its random numbers derive from them.
        samples: encoded, in an order that is the same wherever the client runs.
        received: the weights the client was sent.
        learning_rate: this round's.
    """

    client: str
    round_num: int
    seed: int
    samples: Sequence[Encoded]
    received: Weights
    learning_rate: float


def round_learning_rate(config: TrainingConfig, round_num: int, num_rounds: int) -> float:
    """``lr * (1 + cos(pi * round_num / num_rounds)) / 2``: full in round 0, near zero in the last; or constant."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * round_num / num_rounds))


def train_locally(vlm: VisionLanguageModel, task: LocalTask, rule: LocalRule, config: TrainingConfig) -> LocalResult:
    """Train the adapters on one client's samples, from what it received, with a fresh AdamW.

    A step minimizes the accumulated mean negative log-likelihood of the answer tokens plus the rule's further terms.
    """
    start = {**task.received, **rule.start}
    write_weights(vlm.model, start)
    if config.local_epochs == 0:
        return LocalResult(start, task.received, {})
    vlm.model.train()
    with torch_randomness(vlm.device, task.seed, "dropout", task.round_num, task.client), training_only(vlm.model, rule.trains):
        plan = list(_plan(task, config))
        turn = _Turn(vlm, task, rule, config, len(plan))
        losses = [turn.step(step, position) for position, step in enumerate(plan)]
    vlm.model.eval()
    gradient = {name: (total / len(losses)).float().cpu() for name, total in turn.gradient.items()}
    metrics = {"loss": sum(losses) / len(losses), "steps": float(len(losses))}
    return LocalResult(read_weights(vlm.model), task.received, metrics, gradient)


def _plan(task: LocalTask, config: TrainingConfig) -> Iterator[Step]:
    """The steps of all epochs."""
    for epoch in range(config.local_epochs):
        rng = generator(task.seed, "order", task.round_num, task.client, epoch)
        yield from steps(task.samples, config.batch_size, config.accumulation, rng)


class _Turn:
    """What lives as long as one client's training: its parameters, optimizer and the sum of its gradients."""

    def __init__(self, vlm: VisionLanguageModel, task: LocalTask, rule: LocalRule, config: TrainingConfig, num_steps: int) -> None:
        self._vlm, self._task, self._rule, self._config, self._num_steps = vlm, task, rule, config, num_steps
        self._parameters = dict(trainable(vlm.model))
        self._received = {name: tensor.to(vlm.device) for name, tensor in task.received.items()}
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=task.learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self.gradient: Weights = {}

    def step(self, step: Step, position: int) -> float:
        """One optimizer step; its loss without the rule's further terms."""
        loss = self._backward(step)
        if self._rule.alignment:
            rng = generator(self._task.seed, "alignment", self._task.round_num, self._task.client, position)
            backward_alignment(self._vlm, step, self._rule.alignment, rng, self._config.max_batch_tokens)
        if self._rule.penalty is not None:
            self._rule.penalty(self._parameters, self._received, position / self._num_steps).backward()  # type: ignore[no-untyped-call]
        self._edit_gradients()
        if self._config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self._config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _backward(self, step: Step) -> float:
        total = 0.0
        for batch, weights in passes(self._vlm, step, self._config.max_batch_tokens):
            with self._vlm.autocast():
                loss = (answer_nll(self._vlm, batch) * weights).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def _edit_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if self._rule.records_gradient:
                gradient = parameter.grad.double()
                self.gradient[name] = self.gradient[name].add_(gradient) if name in self.gradient else gradient
            if self._rule.edit_gradient is not None:
                parameter.grad = self._rule.edit_gradient(name, parameter.grad)
