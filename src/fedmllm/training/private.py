"""Optimizer steps that protect single samples. Deep Learning with Differential Privacy. Abadi et al., CCS 2016.

Privacy itself, i.e. accounting and the source of noise, belongs to ``fedmllm.privacy``, which supplies it as data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmllm.errors import ConfigError
from fedmllm.models.encoding import Encoded
from fedmllm.training.batches import Step, poisson_steps
from fedmllm.training.rules import LocalRule
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Weights

_ROUNDING = 1 - 1e-12
"""Keeps rounding in float64 from lifting a clipped norm above its bound."""


class SecretNoise(Protocol):
    """A source of random numbers that nobody can predict, such as ``fedmllm.privacy.noise.Noise``. Several threads may use it at once."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return independent numbers, uniform in (0, 1), of shape (count,)."""
        ...

    def added(self, tensors: Mapping[str, Tensor], deviation: float) -> Weights:
        """Return tensors plus independent normal noise of a standard deviation on every entry, in float64."""
        ...


@dataclass(frozen=True)
class PrivateSteps:
    """How a client's optimizer steps protect single samples.

    Every step draws each of the client's n samples independently with probability ``q = B / n``. With the gradient g_i of the mean loss over
    sample i's own answer tokens, taken over all trainable tensors together, its gradient is

        g = (sum_{i drawn} min(1, C / ||g_i||) g_i + N(0, (z C)^2)) / B

    B is the expected number of drawn samples, never the number drawn, which is secret; an empty draw is a step with noise alone. Penalties
    of the rule depend on no sample and are added to g. Then comes AdamW; ``TrainingConfig.clip_norm`` does not apply. A client's training is
    ``steps`` releases with multiplier z and rate q (``sampling``) under adding or removing one sample. n itself counts as public.

    A gradient that is not finite counts as zero: what a sample contributes may depend on that sample only.

    Attributes:
        clip_norm: C, greater than 0.
        noise_multiplier: z, greater than 0.
        noise: the source of noise and of draws. It must not depend on the experiment's seed, which is public.
        spend: called with (client, number of steps, sampling rate) before each training of a client that takes steps. It records the
            expense durably, and refuses the training by raising an exception.

    Raises:
        ConfigError: if a value is out of range.
    """

    clip_norm: float
    noise_multiplier: float
    noise: SecretNoise
    spend: Callable[[str, int, float], None]

    def __post_init__(self) -> None:
        for name, value in (("clip_norm", self.clip_norm), ("noise_multiplier", self.noise_multiplier)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} of private steps must be greater than 0 and finite, got {value:g}")


@dataclass(frozen=True)
class Sampling:
    """The draws of one local training.

    Attributes:
        batch: B, the expected number of samples of a step.
        rate: q, the probability of a sample to be drawn for a step.
        steps: number of steps.
    """

    batch: int
    rate: float
    steps: int


def sampling(num_samples: int, config: TrainingConfig) -> Sampling:
    """Return how private steps draw from n samples, with ``B = min(batch_size accumulation, n)``, ``q = B / n`` and ``ceil(n / B)`` steps an epoch.

    A client without samples takes no step.
    """
    batch = min(config.batch_size * config.accumulation, num_samples)
    if not batch:
        return Sampling(0, 1.0, 0)
    return Sampling(batch, batch / num_samples, config.local_epochs * math.ceil(num_samples / batch))


def private_plan(private: PrivateSteps, client: str, samples: Sequence[Encoded], config: TrainingConfig) -> list[Step]:
    """Record the expense of a client's training, then draw the samples of all its steps.

    Raises:
        Exception: what ``private.spend`` raises to refuse the training.
    """
    drawing = sampling(len(samples), config)
    if drawing.steps:
        private.spend(client, drawing.steps, drawing.rate)
    return list(poisson_steps(samples, drawing.rate, drawing.steps, private.noise.uniform))


def require_separable(rule: LocalRule, samples: Sequence[Encoded]) -> None:
    """Require that nothing but the samples' own losses depends on the samples.

    Raises:
        ConfigError: if the rule records gradients, or if one of its terms prepares samples or passes them through the model.
    """
    remedy = "use fedavg or ffa_lora without it, or privacy.unit: client"
    if rule.records_gradient:
        raise ConfigError(f"privacy.unit: sample cannot be combined with a method that records gradients before clipping; {remedy}")
    for term in rule.all_terms:
        if term.has_passes or term.prepares_samples:
            raise ConfigError(
                f"privacy.unit: sample cannot be combined with the loss term {term.name}, whose use of the samples is not clipped; {remedy}"
            )
    if any(sample.companions or sample.option_bias is not None for sample in samples):
        raise ConfigError(
            f"privacy.unit: sample needs samples whose losses depend on no other sample, but a loss term prepared them; {remedy}"
        )


def clipped_sum(gradients: Mapping[str, Tensor], clip_norm: float) -> Weights:
    """Return ``sum_i min(1, C / ||g_i||) g_i`` in float64, where the norm is taken over all tensors together.

    Adding or removing a row changes the sum by a vector of norm at most C. A row with an entry that is not finite counts as zero.

    Args:
        gradients: the gradients of samples, of shape (samples, ...), by name; at least one.
        clip_norm: C.
    """
    rows = {name: gradient.flatten(1) for name, gradient in gradients.items()}
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1, dtype=torch.float64) for row in rows.values()]).square().sum(0).sqrt()
    finite = norms.isfinite()
    scales = torch.where(finite, (clip_norm / norms * _ROUNDING).clamp(max=1.0), 0.0)
    if not finite.all():
        # Zero times infinity is not a number.
        rows = {name: torch.where(finite[:, None], row, 0.0) for name, row in rows.items()}
    return {name: (scales @ row.double()).reshape(gradients[name].shape[1:]) for name, row in rows.items()}


class PrivateGradient:
    """The gradient of one client's private steps. Only ``release`` returns anything of it, and it adds noise.

    Args:
        private: how steps protect samples.
        batch: B, the expected number of samples of a step.
        parameters: the tensors that train.
    """

    def __init__(self, private: PrivateSteps, batch: int, parameters: Mapping[str, Tensor]) -> None:
        self._private, self._batch = private, batch
        self._sum = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in parameters.items()}

    def add(self, gradients: Mapping[str, Tensor]) -> None:
        """Clip the gradients of samples, of shape (samples, ...) by name, and add them to the step's sum. A missing tensor counts as zero."""
        if gradients:
            for name, total in clipped_sum(gradients, self._private.clip_norm).items():
                self._sum[name] += total

    def forget(self) -> None:
        """Discard the sum."""
        for total in self._sum.values():
            total.zero_()

    def release(self) -> Weights:
        """Return the step's gradient with noise in float64, and begin the next step's sum."""
        deviation = self._private.noise_multiplier * self._private.clip_norm
        noisy = self._private.noise.added(self._sum, deviation)
        self.forget()
        return {name: total / self._batch for name, total in noisy.items()}
