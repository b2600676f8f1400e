"""The privacy of a run: the noise for a budget, the rounds that it affords, and what the ledger says was spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmllm.config import Experiment
from fedmllm.engine.stages import Stage
from fedmllm.errors import ConfigError
from fedmllm.privacy.accounting import Releases, affordable, epsilon, require_library
from fedmllm.privacy.bands import BandedNoise, prefix_error
from fedmllm.privacy.client_level import ClientPrivacy
from fedmllm.privacy.clipping import AdaptiveClip
from fedmllm.privacy.ledger import LEDGER, Ledger
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.statement import PrivacyStatement
from fedmllm.training.private import PrivateSteps
from fedmllm.types import Record


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

    def steps(self, folder: Path) -> PrivateSteps | None:
        """Return None: optimizer steps are not private."""
        return None

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
        if self.rate < 1:
            rounds = min(federation.num_rounds, done + max(0, allowed - len(lines)))
        else:
            rounds = affordable_rounds(stage, self.experiment.seed, _counts(lines), lambda client: allowed, done)
        return with_rounds(self.experiment, rounds, self.noise_multiplier)

    def mechanism(self, folder: Path) -> ClientPrivacy | None:
        """Return what clips and adds noise in a run."""
        config = self.experiment.privacy
        adaptive = AdaptiveClip(config.clip_quantile) if config.clip_quantile is not None else None
        noise, ledger = Noise(config.noise_seed), Ledger(folder / LEDGER)
        cohort = self.experiment.federation.clients_per_round
        banded = BandedNoise(config.bands, noise) if config.bands > 1 else None
        return ClientPrivacy(config.clip_norm, self.noise_multiplier, cohort, noise, ledger, self.rate, adaptive, banded=banded)

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
    """Return the plan of an experiment; None without client-level privacy.

    Raises:
        ConfigError: if the budget affords no round, or ``dp-accounting`` is not installed.
    """
    if experiment.privacy.unit != "none":
        require_library()
    if experiment.privacy.unit != "client":
        return None
    stage = nameless(experiment)
    plan = PrivacyPlan(experiment, experiment.privacy.multiplier(participations(stage, experiment.seed), _rate(experiment)))
    plan.limited(stage)
    return plan


def announcement(noise_multiplier: float, asked: Experiment, limited: Experiment) -> str:
    """Return what privacy means for a run that is about to begin.

    Args:
        noise_multiplier: z; 0 if only the sites know it.
        asked: the experiment.
        limited: the experiment with the rounds that its budget affords.
    """
    config, rounds = asked.privacy, limited.federation.num_rounds
    noise = f"noise multiplier {noise_multiplier:.4g}" if noise_multiplier else "the sites choose the noise"
    fewer = (
        ""
        if rounds == asked.federation.num_rounds
        else f" instead of {asked.federation.num_rounds}, because target_epsilon affords no more"
    )
    seeded = "" if config.noise_seed is None else "; noise_seed is set, so there is no guarantee"
    cancel = (
        f", {config.bands} bands (noise of sums over rounds {prefix_error(config.bands, rounds):.2f} times)" if config.bands > 1 else ""
    )
    return f"unit {config.unit}, {noise}{cancel}, {rounds} rounds{fewer}{seeded}"


def nameless(experiment: Experiment) -> Stage:
    """Return the federation's stage without data. Cohorts depend on the clients' order only."""
    federation = experiment.federation
    names = {f"{number:09}": () for number in range(federation.num_clients)}
    return Stage("federated", names, federation.num_rounds, federation.clients_per_round, sampling=federation.sampling)


def with_rounds(experiment: Experiment, rounds: int, noise_multiplier: float) -> Experiment:
    """Return the experiment with the number of rounds that its budget affords.

    Raises:
        ConfigError: if it is 0.
    """
    if rounds == 0:
        raise ConfigError(
            f"privacy.target_epsilon: {experiment.privacy.target_epsilon:g} affords no round with noise_multiplier {noise_multiplier:g}; raise "
            "either of them, or omit noise_multiplier"
        )
    return experiment.model_copy(update={"federation": experiment.federation.model_copy(update={"num_rounds": rounds})})


def _rate(experiment: Experiment) -> float:
    federation = experiment.federation
    return federation.clients_per_round / federation.num_clients if federation.sampling == "poisson" else 1.0


def participations(stage: Stage, seed: int) -> int:
    """Return the largest number of rounds in which a client may take part."""
    if stage.sampling == "poisson":
        return stage.num_rounds
    return max(Counter(client for number in range(stage.num_rounds) for client in stage.cohort(seed, number)).values())


def affordable_rounds(stage: Stage, seed: int, spent: Mapping[str, int], allowed: Callable[[str], int], done: int) -> int:
    """Return the number of rounds after which no client took part more often than it may.

    Args:
        stage: the federation, whose cohorts are public.
        seed: the experiment's seed.
        spent: how often each client took part so far.
        allowed: how often a client may take part in total.
        done: finished rounds.
    """
    counts = Counter(spent)
    for number in range(done, stage.num_rounds):
        counts.update(cohort := stage.cohort(seed, number))
        if any(counts[client] > allowed(client) for client in cohort):
            return number
    return stage.num_rounds


def _counts(lines: Sequence[Record]) -> Counter[str]:
    """Return the number of releases in which each client took part, if the ledger names them."""
    return Counter(client for line in lines for client in line.get("clients", ()))
