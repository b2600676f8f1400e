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


UNPROTECTED = (
    "The guarantee covers the adapter and what follows from it, e.g. its scores. It does not cover the manifest, the baselines, scores by client, "
    "or what a simulation keeps under checkpoints. Several units of one person are not protected as one."
)
"""What the guarantee of a run does not cover."""
