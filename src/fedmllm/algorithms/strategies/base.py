"""What a strategy is: something that is added to any method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from fedmllm.algorithms.base import Algorithm, Client, Fact
from fedmllm.algorithms.transforms import UpdateTransform
from fedmllm.training.rules import LocalRule
from fedmllm.training.terms import LossTerm
from fedmllm.types import Broadcast, Profile


@dataclass(frozen=True)
class Holdings:
    """What a strategy meets in an experiment, as far as it is known before the first round.

    Attributes:
        profiles: by client, its samples by modalities; empty for a client that does not say.
        options: whether a client holds a question with options; None where samples are elsewhere.
        tensors: names of what trains.
        terms: what the method itself adds to its clients' loss.
    """

    profiles: Mapping[str, Profile]
    options: bool | None
    tensors: tuple[str, ...]
    terms: tuple[LossTerm, ...] = ()


class Remark(NamedTuple):
    """What is to be known about a strategy in an experiment.

    Attributes:
        text: what it does otherwise than its description has it, and why.
        idle: whether it changes nothing at all: then the run is that of the method without it.
    """

    text: str
    idle: bool


class Strategy:
    """Changes a method's client rule, what happens to its updates, or the wording of prompts. This one changes nothing."""

    wording: ClassVar[str | None] = None
    """The wording of prompts that the strategy stands for, a value of ``data.prompt``; None for one that works with any."""

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        """What happens to updates, after the method's own transforms."""
        return ()

    @property
    def reweighs(self) -> bool:
        """Whether it changes what updates weigh."""
        return any(transform.reweighs for transform in self.transforms)

    @property
    def needs(self) -> frozenset[Fact]:
        """What clients must tell of themselves, as of a method."""
        return frozenset()

    @property
    def needs_labels(self) -> bool:
        """Whether its rule reads how often each answer occurs over all clients."""
        return False

    def rule(self, rule: LocalRule, broadcast: Broadcast, client: Client) -> LocalRule:
        """The client's rule, from the method's."""
        return rule

    def remark(self, holdings: Holdings) -> Remark | None:
        """What is to be known about it before it runs; None if it does what it is described to."""
        return None


class Composed:
    """A method with strategies, applied in their order; everything they do not touch is the method's own.

    Args:
        method: any method.
        strategies: what is added to it.
    """

    def __init__(self, method: Algorithm, strategies: tuple[Strategy, ...]) -> None:
        self._method, self._strategies = method, strategies

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    @property
    def needs(self) -> frozenset[Fact]:
        """What the method or a strategy needs to be told."""
        return self._method.needs.union(*(strategy.needs for strategy in self._strategies))

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        """The method's, then each strategy's."""
        return (*self._method.transforms, *(transform for strategy in self._strategies for transform in strategy.transforms))

    @property
    def needs_labels(self) -> bool:
        """Whether the method or a strategy does."""
        return self._method.needs_labels or any(strategy.needs_labels for strategy in self._strategies)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """The method's rule with what the strategies add."""
        rule = self._method.local_rule(broadcast, client)
        for strategy in self._strategies:
            rule = strategy.rule(rule, broadcast, client)
        return rule
