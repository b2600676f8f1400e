"""The interface of a strategy, an addition that composes with any method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from fedmllm.algorithms.base import Algorithm, Fact
from fedmllm.algorithms.state import Client
from fedmllm.algorithms.transforms import UpdateTransform
from fedmllm.training.rules import LocalRule
from fedmllm.training.terms import LossTerm
from fedmllm.types import Broadcast, Profile


@dataclass(frozen=True)
class Holdings:
    """What is known about an experiment's clients and model before the first round.

    Attributes:
        profiles: each client's sample counts by modality; empty for a client that does not report them.
        options: whether any client holds a question with options; None if the samples are remote.
        tensors: names of the trainable tensors.
        terms: the loss terms of the method itself.
    """

    profiles: Mapping[str, Profile]
    options: bool | None
    tensors: tuple[str, ...]
    terms: tuple[LossTerm, ...] = ()


class Remark(NamedTuple):
    """A note that a strategy does not act as described in this experiment.

    Attributes:
        text: how it differs from its description, and why.
        idle: whether it has no effect at all, so that the run equals a run without it.
    """

    text: str
    idle: bool


class Strategy:
    """Base class of strategies. A strategy changes the local rule, the update transforms or the wording; this class changes nothing."""

    wording: ClassVar[str | None] = None
    """The value of ``data.prompt`` that the strategy requires; None if it works with any wording."""

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        """Update transforms that run after the method's own."""
        return ()

    @property
    def reweighs(self) -> bool:
        """Whether the strategy changes the weights of updates."""
        return any(transform.reweighs for transform in self.transforms)

    @property
    def needs(self) -> frozenset[Fact]:
        """What clients must report about themselves; see ``Algorithm.needs``."""
        return frozenset()

    @property
    def needs_labels(self) -> bool:
        """Whether the strategy reads how often each answer occurs over all clients."""
        return False

    def rule(self, rule: LocalRule, broadcast: Broadcast, client: Client) -> LocalRule:
        """Return the client's local rule, given the method's."""
        return rule

    def remark(self, holdings: Holdings) -> Remark | None:
        """Return how the strategy differs from its description in this experiment; None if it acts as described."""
        return None


class Composed:
    """A method with strategies, applied in order. Attributes that no strategy changes come from the method.

    Args:
        method: any method.
        strategies: the strategies to add.
    """

    def __init__(self, method: Algorithm, strategies: tuple[Strategy, ...]) -> None:
        self._method, self._strategies = method, strategies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    @property
    def needs(self) -> frozenset[Fact]:
        """What the method or a strategy needs clients to report."""
        return self._method.needs.union(*(strategy.needs for strategy in self._strategies))

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        """The method's transforms, then each strategy's."""
        return (*self._method.transforms, *(transform for strategy in self._strategies for transform in strategy.transforms))

    @property
    def needs_labels(self) -> bool:
        """Whether the method or a strategy needs answer counts."""
        return self._method.needs_labels or any(strategy.needs_labels for strategy in self._strategies)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Return the method's rule as changed by each strategy in order."""
        rule = self._method.local_rule(broadcast, client)
        for strategy in self._strategies:
            rule = strategy.rule(rule, broadcast, client)
        return rule
