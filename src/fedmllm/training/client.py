"""The state of one client's local training, which the loop in ``training.local`` advances step by step, alone or for parallel clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmllm import factors
from fedmllm.errors import ConfigError
from fedmllm.models.encoding import Encoded
from fedmllm.models.load import VisionLanguageModel
from fedmllm.randomness import generator
from fedmllm.training.batches import Step, steps
from fedmllm.training.private import PrivateGradient, PrivateSteps, private_plan, sampling
from fedmllm.training.rules import LocalResult, LocalRule
from fedmllm.training.schedule import of_step
from fedmllm.training.settings import TrainingConfig
from fedmllm.training.terms import TermStep
from fedmllm.types import Weights


@dataclass(frozen=True)
class LocalTask:
    """The local training of one client in one round.

    Attributes:
        client, round_num, seed: identify the task; all its random numbers derive from them.
        samples: the encoded samples, in an order that does not depend on where the client runs.
        received: the weights that the client received.
        learning_rate: the learning rate of this round.
        rank: the client's LoRA rank if it is lower than that of the weights received, which are zero beyond it. Noise must not fill them.
    """

    client: str
    round_num: int
    seed: int
    samples: Sequence[Encoded]
    received: Weights
    learning_rate: float
    rank: int | None = None


Adapters = Callable[[Sequence["ClientTraining"], Sequence[int]], AbstractContextManager[None]]
"""(clients, number of rows of each) -> a context for the forward and backward pass of a batch, whose rows go through their own client's
adapters."""


@dataclass(frozen=True)
class Route:
    """How samples pass through the model.

    Attributes:
        adapters: the adapters of a batch's rows.
        max_rows: maximum number of rows of a batch; None for any number.
    """

    adapters: Adapters
    max_rows: int | None = None


class ClientTraining:
    """The state of one client's local training: its plan, parameters and optimizer, and the sums of its losses and gradients.

    Args:
        vlm: the model.
        task: the client's task.
        rule: how the method departs from plain training.
        config: the training settings.
        weights: the client's tensors; those that train require gradients.
        private: how steps protect single samples; None if they do not. The expense is recorded at once.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        task: LocalTask,
        rule: LocalRule,
        config: TrainingConfig,
        weights: Weights,
        private: PrivateSteps | None = None,
    ) -> None:
        self._vlm, self._task, self._rule, self._config, self.weights = vlm, task, rule, config, weights
        self.plan = list(_plan(task, config)) if private is None else private_plan(private, task.client, task.samples, config)
        self.loss, self.halvings = 0.0, 0
        self._parameters = {name: tensor for name, tensor in weights.items() if tensor.requires_grad}
        batch = sampling(len(task.samples), config).batch
        self._private = None if private is None else PrivateGradient(private, batch, self._parameters)
        self._received = {name: tensor.to(vlm.device) for name, tensor in task.received.items()}
        betas = (config.beta1, config.beta2)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=task.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=True
        )
        self._gradient: Weights = {}

    @property
    def longest(self) -> Encoded | None:
        """The client's longest sample; None if it has no samples."""
        return max((sample for step in self.plan for sample in step.samples), key=lambda sample: len(sample.input_ids), default=None)

    def forget(self) -> None:
        """Discard the client's gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None
        if self._private is not None:
            self._private.forget()

    def add_samples(self, gradients: Mapping[str, Tensor]) -> None:
        """Clip the gradients of single samples, of shape (samples, ...) by name, and add them to a private step.

        Raises:
            ConfigError: if the client's steps are not private.
        """
        if self._private is None:
            raise ConfigError("gradients of single samples belong to private steps; set privacy.unit to sample")
        self._private.add({name: gradient for name, gradient in gradients.items() if name in self._parameters})

    def add_own_gradient(self) -> None:
        """Move the gradient of one sample from the client's parameters to a private step."""
        self.add_samples({name: tensor.grad[None] for name, tensor in self._parameters.items() if tensor.grad is not None})
        for parameter in self._parameters.values():
            parameter.grad = None

    def add_terms(self, position: int, max_tokens: int, adapters: Adapters) -> None:
        """Add the gradients of those loss terms that pass samples through the model themselves."""
        for term in self._rule.all_terms:
            if term.has_passes:
                rng = generator(self._task.seed, term.name, self._task.round_num, self._task.client, position)
                with adapters([self], [1]):
                    term.backward(TermStep(self._vlm, self.plan[position].samples, rng, max_tokens))

    def update(self, position: int) -> None:
        """Add the gradient of the rule's penalty, edit and clip the gradients, and take an optimizer step.

        In a private step, gradients have already been clipped sample by sample. Here they get their noise, before the penalty.
        """
        self._release()
        penalty = self._rule.penalty(self._parameters, self._received, position / len(self.plan))
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        self._edit_gradients()
        if self._config.clip_norm is not None and self._private is None:
            torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self._config.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._task.learning_rate * of_step(self._config.schedule, position, len(self.plan))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _release(self) -> None:
        """Set the gradients of a private step."""
        if self._private is None:
            return
        noisy = factors.padded(factors.cut(self._private.release(), self._task.rank), self._parameters)
        for name, parameter in self._parameters.items():
            parameter.grad = noisy[name].to(parameter.dtype)

    def _edit_gradients(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            if self._rule.records_gradient:
                gradient = parameter.grad.double()
                self._gradient[name] = self._gradient[name].add_(gradient) if name in self._gradient else gradient
            if self._rule.edit_gradient is not None:
                parameter.grad = self._rule.edit_gradient(name, parameter.grad)

    def result(self, weights: Weights) -> LocalResult:
        """Return the result of the training, given the final weights."""
        if not self.plan or self._private is not None:
            # A private step's loss has no noise, and whether it fitted into memory depends on its draw.
            return LocalResult(weights, self._task.received, {"steps": float(len(self.plan))})
        gradient = {name: (total / len(self.plan)).float().cpu() for name, total in self._gradient.items()}
        metrics = {"loss": self.loss / len(self.plan), "steps": float(len(self.plan))}
        metrics |= {"halvings": float(self.halvings)} if self.halvings else {}
        return LocalResult(weights, self._task.received, metrics, gradient)


def _plan(task: LocalTask, config: TrainingConfig) -> Iterator[Step]:
    """Yield the steps of all epochs."""
    for epoch in range(config.local_epochs):
        rng = generator(task.seed, "order", task.round_num, task.client, epoch)
        yield from steps(task.samples, config.batch_size, config.accumulation, rng)
