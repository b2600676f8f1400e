"""Modality-agnostic alignment: answers that do not depend on which modality is missing. Our own form of an idea of arXiv 2411.14717."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedmllm.algorithms.base import Client, require_not_negative
from fedmllm.algorithms.strategies.base import Strategy
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
