"""Secure aggregation of a run: how clients encode their updates, who they are, and what the server may claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from fedmllm.config import Experiment
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.parties import Identity, Parties
from fedmllm.engine.rounds import Loop
from fedmllm.engine.secure import FACTS, SecureAggregation
from fedmllm.errors import ConfigError, FederationError, listing
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.secagg.encoding import Encoding
from fedmllm.privacy.secagg.policy import Policy, threshold
from fedmllm.privacy.secagg.quantize import Private, Weighted
from fedmllm.privacy.secagg.statements import SitePublicKey
from fedmllm.privacy.secagg.used import UsedRounds
from fedmllm.privacy.statement import SecureStatement
from fedmllm.types import Record

_LONGEST = 64
"""Characters that the name of a client may have in a session."""


def encoding(experiment: Experiment, noise_multiplier: float | None, source: Noise | None = None) -> Encoding:
    """Return how the clients of an experiment turn updates into integers.

    Args:
        experiment: the experiment's settings.
        noise_multiplier: z of client-level privacy; None without it.
        source: the clients' noise; by default fresh noise of this process.

    Raises:
        ConfigError: if the noise is too small for integers.
    """
    config, cohort = experiment.privacy, experiment.federation.clients_per_round
    if noise_multiplier is None:
        return Encoding(Weighted(config.value_range))
    least = config.smallest_sum(cohort)
    quantizer = Private(config.clip_norm, noise_multiplier, cohort, least, config.assumed_colluders)
    return Encoding(quantizer, config.noise == "clients", source or Noise())


@dataclass(frozen=True)
class SecurePlan:
    """Secure aggregation in an experiment.

    Attributes:
        experiment: the experiment's settings.
        noise_multiplier: z of client-level privacy; None without it.
    """

    experiment: Experiment
    noise_multiplier: float | None

    @cached_property
    def encoding(self) -> Encoding:
        """How clients turn updates into integers. In a simulation they share one source of noise."""
        return encoding(self.experiment, self.noise_multiplier, Noise(self.experiment.privacy.noise_seed))

    @property
    def min_clients(self) -> int:
        """The smallest number of clients in a sum."""
        return self.experiment.privacy.smallest_sum(self.experiment.federation.clients_per_round)

    @property
    def announcement(self) -> str:
        """What it means for a run that is about to begin."""
        cohort = self.experiment.federation.clients_per_round
        spare = cohort - max(self.min_clients, threshold(cohort))
        leaving = f"{spare} of {cohort} clients may leave" if spare else f"no client of {cohort} may leave"
        return f"sums of at least {self.min_clients} clients; {leaving} a session, or its round is skipped"

    def among_sites(self, loop: Loop, run: str, folder: Path, keys: Mapping[str, SitePublicKey]) -> Loop:
        """Return a loop that sums the updates of sites.

        Args:
            loop: the loop, whose engine carries messages to sites.
            run: the run's id.
            folder: the run folder.
            keys: the sites' public keys.
        """
        used = UsedRounds(folder / "checkpoints" / "masked.jsonl")
        return replace(loop, secure=SecureAggregation(run, self.encoding, keys, self.min_clients, used))

    def simulated(self, loop: Loop, engine: InProcessEngine, run: str, folder: Path, names: Sequence[str]) -> Loop:
        """Return a loop whose simulated clients hold their updates back. Their keys live in this process only.

        Raises:
            ConfigError: if the name of a client is too long.
        """
        if too_long := [name for name in names if len(name) > _LONGEST]:
            raise ConfigError(f"privacy.secure_aggregation: names of clients have at most {_LONGEST} characters, got {too_long[0]!r}")
        own = {name: ec.generate_private_key(ec.SECP384R1()) for name in names}
        keys, policy = {name: key.public_key() for name, key in own.items()}, Policy(self.min_clients)

        def identity(client: str) -> Identity:
            return Identity(own[client], UsedRounds(folder / "checkpoints" / "masked" / f"{names.index(client)}.jsonl"), policy)

        return self.among_sites(replace(loop, engine=replace(engine, parties=Parties(self.encoding, identity, keys))), run, folder, keys)

    def require_sum(self, records: Sequence[Record]) -> None:
        """Require that at least one round has a sum, unless the settings allow rounds to be skipped.

        Raises:
            FederationError: if every session failed, so that the adapter is untrained.
        """
        if self.experiment.failures.below == "skip" or not all(record["skipped"] for record in records):
            return
        reasons = dict.fromkeys(str(record.get(FACTS, {}).get("failed")) for record in records)
        raise FederationError(
            f"no round has a sum, because every session of secure aggregation failed:\n{listing(reasons)}\nfix the causes, and start the run again in "
            "another folder"
        )

    def statement(self, records: Sequence[Record]) -> SecureStatement:
        """Return what a run may claim, given the metrics of the federation's rounds."""
        config, private = self.experiment.privacy, self.noise_multiplier is not None
        return SecureStatement(
            min_clients=self.min_clients,
            sums=sum(not record["skipped"] for record in records),
            skipped=sum(record["skipped"] for record in records),
            noise=config.noise if private else None,
            assumed_colluders=config.assumed_colluders,
            simulated=self.experiment.engine.server is None,
        )


def secure_plan(experiment: Experiment, noise_multiplier: float | None) -> SecurePlan | None:
    """Return the plan of an experiment; None without secure aggregation.

    Args:
        experiment: the experiment's settings.
        noise_multiplier: z of client-level privacy; None without it.

    Raises:
        ConfigError: if the noise is too small for integers.
    """
    if not experiment.privacy.secure_aggregation:
        return None
    plan = SecurePlan(experiment, noise_multiplier)
    _ = plan.encoding
    return plan
