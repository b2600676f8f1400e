"""Lightweight modelling of heterogeneity: updates count by what their clients cover. Our own form of an idea of arXiv 2411.14717."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from fedmllm.algorithms.base import Fact, ServerState, require_not_negative
from fedmllm.algorithms.strategies.base import Holdings, Remark, Strategy
from fedmllm.algorithms.transforms import UpdateTransform
from fedmllm.types import ClientUpdate, Profile


@dataclass(frozen=True)
class ModalityCoverage(Strategy):
    """Multiplies an update's weight by how much of every modality its client holds per sample.

        weight_k <- weight_k (c_k / s_k)^power,   c_k = 1/M sum_m n_km / N_m,   s_k = n_k / N

    n_km counts the client's samples that hold modality m, N_m those of all clients, n_k and N samples in all. Each modality has
    the same say, so that samples of a rare one, and samples that hold several, count for more. Where every sample is complete the
    factor is 1. Clients send these counts and nothing else. Methods that count clients alike whatever updates weigh (median, trimmed mean,
    Krum) are refused.

    Attributes:
        power: 0 changes nothing.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        require_not_negative(power=self.power)

    @property
    def needs(self) -> frozenset[Fact]:
        """n_km, and N_m which they add up to."""
        return frozenset({"profile"})

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        """The rule above."""
        return (CoverageWeight(self.power),)

    def remark(self, holdings: Holdings) -> Remark | None:
        """Idle where all clients cover the modalities alike: their factors, whose mean by samples is 1, are 1 then."""
        if not self.power:
            return Remark("its power is 0", idle=True)
        profiles = holdings.profiles.values()
        if not any(profiles):
            return Remark("no client says which modalities it holds", idle=True)
        everyone = sum((Counter(profile) for profile in profiles), Counter[str]())
        if all(profiles) and all(coverage(profile, everyone) == 1 for profile in profiles):
            return Remark("all clients cover the modalities alike, so that updates weigh as they do without it", idle=True)
        return None


@dataclass(frozen=True)
class CoverageWeight(UpdateTransform):
    """``weight_k <- weight_k (c_k / s_k)^power``."""

    power: float
    name = "modality_coverage"

    def weigh(self, weight: float, update: ClientUpdate, state: ServerState) -> float:
        """By the counts that came with the update, and the population's."""
        factor = coverage(update.profile, state.population.profile)
        return weight * float(float(factor) ** self.power)


def coverage(own: Profile, everyone: Profile) -> Fraction:
    """``c_k / s_k`` as above, exactly; 1 without counts."""
    held, there = by_modality(own), by_modality(everyone)
    if not held or not there:
        return Fraction(1)
    share = Fraction(sum(own.values()), sum(everyone.values()))
    return sum((Fraction(held[m], there[m]) for m in there), Fraction(0)) / len(there) / share


def by_modality(profile: Profile) -> Counter[str]:
    """Samples that hold each modality."""
    counts: Counter[str] = Counter()
    for kind, number in profile.items():
        counts.update(dict.fromkeys(kind.split("+"), number))
    del counts["none"]
    return counts
