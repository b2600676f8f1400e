"""Modality-agnostic alignment: answers that do not depend on which modality is missing. Our own form of an idea of arXiv 2411.14717."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedmllm.algorithms.base import Client, require_not_negative
from fedmllm.algorithms.strategies.base import Holdings, Remark, Strategy
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast


@dataclass(frozen=True)
class FeatureAlignment(Strategy):
    """Adds ``weight`` times the mean over answer tokens of ``KL(p(. | complete) || p(. | one modality less))`` to the clients' loss.

    The distributions are the model's over the answer's tokens: for a question with options, over their letters. The complete
    sample teaches, its copy learns. Only samples that hold two modalities or more have a copy; ``weight = 0`` changes nothing.

    Attributes:
        weight: of the term.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        require_not_negative(weight=self.weight)

    def rule(self, rule: LocalRule, broadcast: Broadcast, client: Client) -> LocalRule:
        """The rule with the alignment's weight."""
        return replace(rule, alignment=self.weight)

    def remark(self, holdings: Holdings) -> Remark | None:
        """Idle where nobody holds a sample that could lose a modality."""
        if not self.weight:
            return Remark("its weight is 0", idle=True)
        profiles = holdings.profiles.values()
        if all(profiles) and not any("+" in kind for profile in profiles for kind in profile):
            return Remark("no client holds a sample of two modalities, so that there is nothing to align", idle=True)
        return None
