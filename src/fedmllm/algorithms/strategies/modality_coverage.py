"""Lightweight modeling of heterogeneity: updates are weighted by modality coverage. Our own form of an idea from arXiv 2411.14717."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from fedmllm.algorithms.base import Fact
from fedmllm.algorithms.checks import require_not_negative
from fedmllm.algorithms.state import ServerState
from fedmllm.algorithms.strategies.base import Holdings, Remark, Strategy
from fedmllm.algorithms.transforms import UpdateTransform
from fedmllm.types import ClientUpdate, Profile


@dataclass(frozen=True)
class ModalityCoverage(Strategy):
    """Multiplies an update's weight by its client's mean share of each modality, relative to its share of all samples.

        weight_k <- weight_k (c_k / s_k)^power,   c_k = 1/M sum_m n_km / N_m,   s_k = n_k / N

    n_km is the client's number of samples with modality m and N_m that of all clients; n_k and N are the numbers of all samples, and M is
    the number of modalities. Every modality counts equally, so samples with a rare modality or with several modalities count more. If
    every sample is complete, the factor is 1. Clients report these counts and nothing else. The strategy cannot be combined with methods
    that ignore the weights of updates (median, trimmed mean, Krum).

    Attributes:
        power: exponent of the factor; 0 changes nothing.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        require_not_negative(power=self.power)

    @property
    def needs(self) -> frozenset[Fact]:
        """The modality profile: it gives n_km, and N_m is its sum over clients."""
        return frozenset({"profile"})

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        """The transform that reweighs updates."""
        return (CoverageWeight(self.power),)

    def remark(self, holdings: Holdings) -> Remark | None:
        """Report that the strategy is idle if every factor is 1 or no client reports its modalities."""
        if not self.power:
            return Remark("its power is 0", idle=True)
        profiles = holdings.profiles.values()
        if not any(profiles):
            return Remark("no client reports its modalities", idle=True)
        everyone = sum((Counter(profile) for profile in profiles), Counter[str]())
        if all(profiles) and all(coverage(profile, everyone) == 1 for profile in profiles):
            return Remark("all clients cover the modalities equally, so the weights of updates do not change", idle=True)
        return None


@dataclass(frozen=True)
class CoverageWeight(UpdateTransform):
    """``weight_k <- weight_k (c_k / s_k)^power``; see ``ModalityCoverage``."""

    power: float
    name = "modality_coverage"

    def weigh(self, weight: float, update: ClientUpdate, state: ServerState) -> float:
        """Return the weight times the factor from the update's profile and the population's."""
        factor = coverage(update.profile, state.population.profile)
        return weight * float(float(factor) ** self.power)


def coverage(own: Profile, everyone: Profile) -> Fraction:
    """Return ``c_k / s_k`` (see ``ModalityCoverage``) as an exact fraction; 1 without counts."""
    held, there = by_modality(own), by_modality(everyone)
    if not held or not there:
        return Fraction(1)
    share = Fraction(sum(own.values()), sum(everyone.values()))
    return sum((Fraction(held[m], there[m]) for m in there), Fraction(0)) / len(there) / share


def by_modality(profile: Profile) -> Counter[str]:
    """Return the number of samples that hold each modality."""
    counts: Counter[str] = Counter()
    for kind, number in profile.items():
        counts.update(dict.fromkeys(kind.split("+"), number))
    del counts["none"]
    return counts
