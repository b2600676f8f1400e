"""The privacy of single samples in a run: the noise for a budget, the rounds that it affords, and what the ledger says was spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmllm.config import Experiment
from fedmllm.engine.stages import Stage
from fedmllm.errors import ConfigError
from fedmllm.privacy.accounting import COARSE, Releases, affordable, epsilon
from fedmllm.privacy.client_level import ClientPrivacy
from fedmllm.privacy.ledger import LEDGER, Ledger
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.sample_level import SampleBudget, noise_for
from fedmllm.privacy.statement import PrivacyStatement
from fedmllm.run.privacy import affordable_rounds, participations, with_rounds
from fedmllm.training.private import PrivateSteps, sampling


@dataclass(frozen=True)
class SamplePlan:
    """What the privacy of single samples costs in an experiment.

    Attributes:
        experiment: the experiment's settings.
        sizes: each client's number of samples; empty if clients are sites, which plan for themselves.
        trainings: number of trainings of a client in a round: 2 if the method also trains a personalized model.
        noise_multiplier: z, as set or as found for the client that needs the most; 0 if clients are sites.
    """

    experiment: Experiment
    sizes: Mapping[str, int]
    trainings: int
    noise_multiplier: float

    def mechanism(self, folder: Path) -> ClientPrivacy | None:
        """Return None: clients add the noise."""
        return None

    def steps(self, folder: Path) -> PrivateSteps | None:
        """Return how clients in this process train; None if clients are sites."""
        if not self.sizes:
            return None
        config = self.experiment.privacy
        budget = SampleBudget(Ledger(folder / LEDGER), self.noise_multiplier, config.target_epsilon, config.target_delta)
        return budget.steps(config.clip_norm, Noise(config.noise_seed))

    def limited(self, stage: Stage, folder: Path | None = None, done: int = 0) -> Experiment:
        """Return the experiment with at most as many rounds as every client's budget affords; see ``PrivacyPlan.limited``."""
        config, federation = self.experiment.privacy, self.experiment.federation
        if config.target_epsilon is None or not self.sizes:
            return self.experiment
        lines = Ledger(folder / LEDGER).lines() if folder else []
        trained = Counter(str(line["client"]) for line in lines)
        most = federation.num_rounds * self.trainings + max(trained.values(), default=0)
        allowed = {size: self._affordable(size, most) for size in set(self.sizes.values())}
        spent = {client: -(-count // self.trainings) for client, count in trained.items()}
        rounds = affordable_rounds(stage, self.experiment.seed, spent, lambda client: allowed[self.sizes[client]], done)
        return with_rounds(self.experiment, rounds, self.noise_multiplier)

    def _affordable(self, size: int, most: int) -> int:
        """Return the number of rounds that a client with this many samples can afford."""
        config, drawing = self.experiment.privacy, sampling(size, self.experiment.training)
        if not drawing.steps:
            return most
        each = Releases(self.noise_multiplier, drawing.steps * most, drawing.rate)
        steps = affordable(config.target_epsilon or 0.0, config.target_delta, (), each)
        return steps // (drawing.steps * self.trainings)

    def statement(self, folder: Path) -> PrivacyStatement:
        """Return what the ledger says was spent by the client that spent the most; see ``PrivacyPlan.statement``."""
        config, ledger = self.experiment.privacy, Ledger(folder / LEDGER)
        budget = SampleBudget(ledger, self.noise_multiplier or 1.0, None, config.target_delta)
        spent = [budget.spent(client) for client in sorted({str(line["client"]) for line in ledger.lines()})]
        worst = max(spent, key=lambda rows: epsilon(rows, config.target_delta, COARSE), default=[])
        return PrivacyStatement(
            unit="sample",
            epsilon=epsilon(worst, config.target_delta) if self.sizes else None,
            delta=config.target_delta,
            noise_multiplier=self.noise_multiplier,
            clip_norm=config.clip_norm,
            clip_quantile=None,
            sampling="poisson",
            releases=sum(row.count for row in worst),
            participations=sum(row.count for row in worst),
            rate=max((row.rate for row in worst), default=1.0),
            guaranteed=config.noise_seed is None,
        )


def sample_plan(experiment: Experiment, stage: Stage, trainings: int) -> SamplePlan:
    """Return the plan of an experiment with ``privacy.unit: sample``.

    Args:
        experiment: the experiment.
        stage: the federation, with the clients' samples.
        trainings: see ``SamplePlan``.

    Raises:
        ConfigError: if delta is too large for a client, the budget affords no round, or ``dp-accounting`` is not installed.
    """
    config = experiment.privacy
    if stage.reported:
        return SamplePlan(experiment, {}, trainings, 0.0)
    sizes = {client: len(samples) for client, samples in stage.clients.items()}
    largest = max(sizes.values())
    if config.target_delta * largest >= 1:
        raise ConfigError(
            f"privacy.target_delta: must be less than 1 / {largest}, because a client holds {largest} samples; got {config.target_delta:g}"
        )
    rounds = participations(stage, experiment.seed) * trainings
    plan = SamplePlan(experiment, sizes, trainings, _multiplier(experiment, sizes, rounds))
    plan.limited(stage)
    return plan


def _multiplier(experiment: Experiment, sizes: Mapping[str, int], rounds: int) -> float:
    """Return the noise multiplier: the one that is set, or the one for the client that needs the most, i.e. one of the least samples."""
    config, training = experiment.privacy, experiment.training
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    needed = {size for size in sizes.values() if sampling(size, training).steps}
    return max((noise_for(config.target_epsilon or 0.0, config.target_delta, training, size, rounds) for size in needed), default=1.0)
