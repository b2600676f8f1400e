"""What a client's private steps cost: the releases of its local training over several rounds, and the noise for a target."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.errors import RunError
from fedmllm.privacy.accounting import COARSE, Releases, epsilon, noise_multiplier
from fedmllm.privacy.ledger import Ledger
from fedmllm.privacy.noise import Noise
from fedmllm.training.private import PrivateSteps, sampling
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


@dataclass(frozen=True)
class SampleBudget:
    """What a client may spend on training with private steps, over all its trainings.

    Attributes:
        ledger: counts every training before it begins. It may hold several clients.
        noise_multiplier: z.
        target_epsilon: the largest epsilon; None for no limit.
        delta: the delta at which it holds.
    """

    ledger: Ledger
    noise_multiplier: float
    target_epsilon: float | None
    delta: float

    def steps(self, clip_norm: float, noise: Noise) -> PrivateSteps:
        """Return private steps that spend from this budget."""
        return PrivateSteps(clip_norm, self.noise_multiplier, noise, self.spend)

    def spent(self, client: str) -> list[Releases]:
        """Return a client's releases so far.

        Raises:
            RunError: if the ledger is damaged.
        """
        return self.ledger.releases(client)

    def spend(self, client: str, steps: int, rate: float) -> None:
        """Record a training that is about to begin.

        Args:
            client: the client that trains.
            steps: its number of optimizer steps.
            rate: the probability with which a step draws a sample.

        Raises:
            RunError: if the training would exceed the budget, or the ledger is damaged.
            OSError: if the ledger cannot be written; then the training must not begin.
        """
        each = Releases(self.noise_multiplier, steps, rate)
        if self.target_epsilon is not None:
            reached = epsilon([*self.spent(client), each], self.delta, COARSE)
            if reached > self.target_epsilon * (1 + 1e-9):
                raise RunError(
                    f"the privacy budget of {client} is spent: this training would reach epsilon {reached:.2f} at delta {self.delta:g}, "
                    f"target_epsilon is {self.target_epsilon:g} ({self.ledger.path.name}); raise target_epsilon, or train no further"
                )
        self.ledger.spend(each, client=client)
