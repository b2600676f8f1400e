"""What a client's private steps cost: the releases of its local training over several rounds, and the noise for a target."""

from __future__ import annotations

from fedmllm.privacy.accounting import Releases, noise_multiplier
from fedmllm.training.private import sampling
from fedmllm.training.settings import TrainingConfig


def releases(multiplier: float, config: TrainingConfig, num_samples: int, num_rounds: int = 1) -> Releases:
    """Return the releases of a client's training: one for each step, in which each sample takes part with probability ``B / n``.

    Poisson sampling amplifies privacy because nobody learns which samples a step drew. A second training of each round, such as that of a
    personalized model, costs the same again.

    Args:
        multiplier: z, the noise's standard deviation divided by the clip norm.
        config: the training settings.
        num_samples: n, the client's number of samples.
        num_rounds: number of rounds that the client takes part in.

    Raises:
        ConfigError: if a value is out of range.
    """
    drawing = sampling(num_samples, config)
    return Releases(multiplier, drawing.steps * num_rounds, drawing.rate)


def noise_for(target_epsilon: float, delta: float, config: TrainingConfig, num_samples: int, num_rounds: int = 1) -> float:
    """Return the smallest noise multiplier for which ``releases`` reach at most ``target_epsilon`` at a delta.

    Raises:
        ConfigError: if a value is out of range, no step is taken, or ``dp-accounting`` is not installed.
    """
    drawing = sampling(num_samples, config)
    return noise_multiplier(target_epsilon, delta, drawing.steps * num_rounds, drawing.rate)
