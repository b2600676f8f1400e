"""The privacy of a run: the noise for a budget, the rounds that it affords, and what the ledger says was spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmllm.config import Experiment
from fedmllm.engine.stages import Stage
from fedmllm.errors import ConfigError
from fedmllm.privacy.accounting import Releases, affordable, epsilon
from fedmllm.privacy.client_level import ClientPrivacy
from fedmllm.privacy.clipping import AdaptiveClip
from fedmllm.privacy.ledger import Ledger
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.statement import PrivacyStatement
from fedmllm.types import Record

LEDGER = "privacy.jsonl"
"""Name of the ledger in the run folder."""


@dataclass(frozen=True)
class PrivacyPlan:
    """What client-level privacy costs in an experiment. Costs do not depend on data, so they are known before the first round.

    Attributes:
        experiment: the experiment's settings.
        noise_multiplier: z, as set or as found for ``target_epsilon``.
    """

    experiment: Experiment
    noise_multiplier: float

    @property
    def rate(self) -> float:
        """The probability with which a client takes part in a round in secret; 1 if cohorts are public."""
        return _rate(self.experiment)

    def limited(self, stage: Stage, folder: Path | None = None, done: int = 0) -> Experiment:
        """Return the experiment with at most as many rounds as the budget affords.

        Args:
            stage: the federation.
            folder: the run folder, whose ledger counts; None before the first round. A round that a crash made the run repeat counts twice.
            done: finished rounds.

        Raises:
            ConfigError: if the budget affords no round.
            RunError: if the ledger is damaged.
        """
        config, federation = self.experiment.privacy, self.experiment.federation
        if config.target_epsilon is None:
            return self.experiment
        lines = Ledger(folder / LEDGER).lines() if folder else []
        most = Releases(self.noise_multiplier, len(lines) + federation.num_rounds, self.rate)
        allowed = affordable(config.target_epsilon, config.target_delta, (), most)
        rounds = _affordable_rounds(stage, self.experiment.seed, lines, allowed, done)
        if rounds == 0:
            raise ConfigError(
                f"privacy.target_epsilon: {config.target_epsilon:g} affords no round with noise_multiplier {self.noise_multiplier:g}; raise "
                "either of them, or omit noise_multiplier"
            )
        return self.experiment.model_copy(update={"federation": federation.model_copy(update={"num_rounds": rounds})})

    def mechanism(self, folder: Path) -> ClientPrivacy:
        """Return what clips and adds noise in a run."""
        config = self.experiment.privacy
        adaptive = AdaptiveClip(config.clip_quantile) if config.clip_quantile is not None else None
        noise, ledger = Noise(config.noise_seed), Ledger(folder / LEDGER)
        cohort = self.experiment.federation.clients_per_round
        return ClientPrivacy(config.clip_norm, self.noise_multiplier, cohort, noise, ledger, self.rate, adaptive)

    def statement(self, folder: Path) -> PrivacyStatement:
        """Return what a run's ledger says was spent.

        Raises:
            RunError: if the ledger is damaged.
        """
        config, lines = self.experiment.privacy, Ledger(folder / LEDGER).lines()
        took_part = len(lines) if self.rate < 1 else max(_counts(lines).values(), default=0)
        spent = [Releases(self.noise_multiplier, took_part, self.rate)]
        return PrivacyStatement(
            unit=config.unit,
            epsilon=epsilon(spent, config.target_delta),
            delta=config.target_delta,
            noise_multiplier=self.noise_multiplier,
            clip_norm=config.clip_norm,
            clip_quantile=config.clip_quantile,
            sampling=self.experiment.federation.sampling,
            releases=len(lines),
            participations=took_part,
            rate=self.rate,
            guaranteed=config.noise_seed is None,
        )


def privacy_plan(experiment: Experiment) -> PrivacyPlan | None:
    """Return the plan of an experiment; None without privacy.

    Raises:
        ConfigError: if the budget affords no round, or ``dp-accounting`` is not installed.
    """
    config, federation = experiment.privacy, experiment.federation
    if config.unit == "none":
        return None
    # Cohorts depend on the clients' order only, so the plan needs no data.
    names = {f"{number:09}": () for number in range(federation.num_clients)}
    stage = Stage("federated", names, federation.num_rounds, federation.clients_per_round, sampling=federation.sampling)
    plan = PrivacyPlan(experiment, config.multiplier(_participations(stage, experiment.seed), _rate(experiment)))
    plan.limited(stage)
    return plan


def _rate(experiment: Experiment) -> float:
    federation = experiment.federation
    return federation.clients_per_round / federation.num_clients if federation.sampling == "poisson" else 1.0


def _participations(stage: Stage, seed: int) -> int:
    """Return the largest number of rounds in which a client may take part."""
    if stage.sampling == "poisson":
        return stage.num_rounds
    return max(Counter(client for number in range(stage.num_rounds) for client in stage.cohort(seed, number)).values())


def _affordable_rounds(stage: Stage, seed: int, lines: Sequence[Record], allowed: int, done: int) -> int:
    """Return the number of rounds after which no client took part in more than ``allowed`` releases."""
    if stage.sampling == "poisson":
        return min(stage.num_rounds, done + max(0, allowed - len(lines)))
    counts = _counts(lines)
    for number in range(done, stage.num_rounds):
        counts.update(cohort := stage.cohort(seed, number))
        if max(counts[client] for client in cohort) > allowed:
            return number
    return stage.num_rounds


def _counts(lines: Sequence[Record]) -> Counter[str]:
    """Return the number of releases in which each client took part, if the ledger names them."""
    return Counter(client for line in lines for client in line.get("clients", ()))
