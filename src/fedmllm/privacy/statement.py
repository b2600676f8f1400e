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
        unit: what one unit is: ``client``. The guarantee holds for adding or removing one unit.
        epsilon, delta: the guarantee.
        noise_multiplier: z, the standard deviation of the noise divided by the clip norm.
        clip_norm: C; in the first round, if it adapts.
        clip_quantile: the quantile of the norms that C follows; None for a fixed C.
        sampling: how cohorts were chosen.
        releases: number of noisy sums that were released.
        participations: the largest number of releases that one unit took part in; with secret cohorts, the number of releases.
        rate: the probability with which a unit took part in a release; 1 if cohorts are public.
        guaranteed: whether the noise was unpredictable. Without it epsilon means nothing.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    unit: str
    epsilon: float
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
        if self.rate < 1:
            return (
                f"Each {self.unit} took part in each of {self.releases} releases with probability {self.rate:.3g}, on its own; epsilon assumes that "
                "nobody learns in which."
            )
        how = {"cyclic": "Fixed groups took turns", "uniform": "Cohorts are public"}[self.sampling]
        return (
            f"{how}; a {self.unit} took part in at most {self.participations} of {self.releases} releases, and epsilon counts all of them."
        )

    @property
    def summary(self) -> str:
        """The guarantee in one sentence."""
        if not self.guaranteed:
            return "no privacy guarantee, because noise_seed makes the noise predictable"
        # Rounded up, because a smaller number would claim too much.
        shown = math.ceil(self.epsilon * 100 * (1 - 1e-9)) / 100
        return f"epsilon {shown:.2f} at delta {self.delta:g} for adding or removing one {self.unit}"

    @property
    def mechanism(self) -> str:
        """The mechanism in one sentence."""
        clip = f"clipped to norm {self.clip_norm:g}"
        if self.clip_quantile is not None:
            clip = f"clipped to a norm that follows the {self.clip_quantile:g} quantile of their norms"
        return f"Gaussian noise with multiplier {self.noise_multiplier:.4g} on sums of updates, each {clip}."


UNPROTECTED = (
    "The guarantee covers the adapter and what follows from it, e.g. its scores. It does not cover the manifest, the baselines, scores by client, "
    "or what a simulation keeps under checkpoints."
)
"""What the guarantee of a run does not cover."""
