"""What a run may claim about privacy, as ``result.json``, the report and the model card state it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict


@dataclass(frozen=True)
class PrivacyStatement:
    """A run's differential privacy, from its ledger.

    Attributes:
        unit: what one unit is: ``client`` or ``sample``. The guarantee holds for adding or removing one unit.
        epsilon, delta: the guarantee. With samples, epsilon is that of the client that spent the most; None if only the sites know it.
        noise_multiplier: z, the standard deviation of the noise divided by the clip norm; 0 if only the sites know it.
        clip_norm: C; in the first round, if it adapts.
        clip_quantile: the quantile of the norms that C follows; None for a fixed C.
        sampling: how cohorts, or the samples of a step, were chosen.
        releases: number of noisy sums: one for each round or, with samples, for each optimizer step of a client.
        participations: the largest number of releases that one unit took part in; with secret cohorts, the number of releases.
        rate: the probability with which a unit took part in a release; 1 if cohorts are public.
        guaranteed: whether the noise was unpredictable. Without it epsilon means nothing.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    unit: str
    epsilon: float | None
    delta: float
    noise_multiplier: float
    clip_norm: float
    clip_quantile: float | None
    sampling: str
    releases: int
    participations: int
    rate: float
    guaranteed: bool

    @property
    def assumption(self) -> str:
        """The sentence about sampling that epsilon rests on."""
        if self.epsilon is None:
            return "Each site draws the samples of a step in secret."
        if self.rate < 1:
            return (
                f"Each {self.unit} took part in each of {self.releases} releases with probability {self.rate:.3g}, on its own; epsilon assumes that "
                "nobody learns in which."
            )
        if self.unit == "sample":
            return f"Every sample took part in all {self.releases} optimizer steps of its client."
        how = {"cyclic": "Fixed groups took turns", "uniform": "Cohorts are public"}[self.sampling]
        return (
            f"{how}; a {self.unit} took part in at most {self.participations} of {self.releases} releases, and epsilon counts all of them."
        )

    @property
    def summary(self) -> str:
        """The guarantee in one sentence."""
        if not self.guaranteed:
            return "no privacy guarantee, because noise_seed makes the noise predictable"
        if self.epsilon is None:
            return "each site adds noise to its own training and keeps its own ledger, which states its epsilon"
        # Rounded up, because a smaller number would claim too much.
        shown = math.ceil(self.epsilon * 100 * (1 - 1e-9)) / 100
        return f"epsilon {shown:.2f} at delta {self.delta:g} for adding or removing one {self.unit}"

    @property
    def mechanism(self) -> str:
        """The mechanism in one sentence."""
        if self.epsilon is None:
            return "The sites choose noise and clip norm, at least as strict as this run asks for."
        clip = f"clipped to norm {self.clip_norm:g}"
        if self.clip_quantile is not None:
            clip = f"clipped to a norm that follows the {self.clip_quantile:g} quantile of their norms"
        return f"Gaussian noise with multiplier {self.noise_multiplier:.4g} on sums of {self._summed}, each {clip}."

    @property
    def _summed(self) -> str:
        return "updates" if self.unit == "client" else "gradients of single samples"


@dataclass(frozen=True)
class SecureStatement:
    """What secure aggregation hid from a run's server.

    Attributes:
        min_clients: the smallest number of clients in a sum.
        sums: number of rounds with a sum.
        skipped: number of rounds without one.
        noise: who added the noise of client-level privacy, ``server`` or ``clients``; None without it.
        assumed_colluders: with noise at clients, how many clients of a sum may collude with the server.
        simulated: whether clients and server were one process.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    min_clients: int
    sums: int
    skipped: int
    noise: str | None = None
    assumed_colluders: int = 0
    simulated: bool = False

    @property
    def summary(self) -> str:
        """What the server saw, in one sentence."""
        kind = "noisy sums" if self.noise == "clients" else "sums"
        return (
            f"the server saw updates only in {kind} over at least {self.min_clients} clients ({self.sums} rounds, {self.skipped} skipped)"
        )

    @property
    def limits(self) -> str:
        """What that means for the guarantee of client-level privacy, and what is not promised."""
        found = ["This was a simulation: clients and server were one process, which held all updates."] if self.simulated else []
        if self.noise == "clients":
            allowed = f"at most {self.assumed_colluders}" if self.assumed_colluders else "none"
            found.append(
                f"Clients added the noise, so epsilon also holds against the server if {allowed} of the clients in a sum collude with it."
            )
        elif self.noise == "server":
            found.append("The server saw sums without noise, so epsilon holds for readers of the adapter, not against the server.")
        if self.noise != "clients":
            found.append("Each client also reported its number of samples and its losses, unless it withheld them.")
        return " ".join([*found, "Nobody could check the updates in a sum."])


UNPROTECTED = (
    "The guarantee covers the adapter and what follows from it, e.g. its scores. It does not cover the manifest, the baselines, scores by client, "
    "or what a simulation keeps under checkpoints. Several units of one person are not protected as one."
)
"""What the guarantee of a run does not cover."""
