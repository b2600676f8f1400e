"""What a method changes about local training, as data."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce

from torch import Tensor

from fedmllm.training.terms import LossTerm, Parameters
from fedmllm.types import Metrics, Slots, Weights


@dataclass(frozen=True)
class LocalResult:
    """What local training came to.

    Attributes:
        weights: all tensors, those that did not train included.
        received: what the client was sent.
        metrics: ``loss``, the mean over steps in nats per token, which is left out where no step was taken, and ``steps``.
        gradient: mean over steps of the gradient before any edit or clipping; empty unless the rule asks for it.
    """

    weights: Weights
    received: Weights
    metrics: Metrics
    gradient: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Upload:
    """What a client makes of its result.

    Attributes:
        weights: what it calls its weights; the update is their difference to what it received.
        extras: further tensors for the server, named and shaped like the update.
        keeps: what it keeps for its next turn.
    """

    weights: Weights
    extras: Slots = field(default_factory=dict)
    keeps: Slots = field(default_factory=dict)


def plain_upload(result: LocalResult) -> Upload:
    """The result itself."""
    return Upload(result.weights)


@dataclass(frozen=True)
class LocalRule:
    """How a method departs from plain local training. The neutral values are FedAvg.

    Attributes:
        terms: what the method adds to the loss.
        added: what strategies add to it. They act for the federation's sake, so their penalties see what clients share and not what is ``own``.
        edit_gradient: replaces a gradient before clipping: (name, gradient) -> gradient.
        trains: which tensors train; all for None.
        start: tensors that begin elsewhere than at what the client received.
        own: names of the tensors that the client keeps for itself: what it received of them is nobody's, and no strategy pulls towards it.
        records_gradient: whether ``LocalResult.gradient`` is wanted.
        finish: result -> what is sent and kept.
        personal: a second pass over the same samples, whose weights the client keeps under ``personal``.
    """

    terms: tuple[LossTerm, ...] = ()
    added: tuple[LossTerm, ...] = ()
    edit_gradient: Callable[[str, Tensor], Tensor] | None = None
    trains: Callable[[str], bool] | None = None
    start: Weights = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    records_gradient: bool = False
    finish: Callable[[LocalResult], Upload] = plain_upload
    personal: LocalRule | None = None

    @property
    def all_terms(self) -> tuple[LossTerm, ...]:
        """The method's, then what strategies added."""
        return (*self.terms, *self.added)

    def with_term(self, term: LossTerm) -> LocalRule:
        """The same rule with one more term, for a strategy to add."""
        return replace(self, added=(*self.added, term))

    def without(self, kind: type[LossTerm]) -> LocalRule:
        """The same rule without the terms of a class, whoever added them."""
        terms, added = (tuple(term for term in some if not isinstance(term, kind)) for some in (self.terms, self.added))
        return replace(self, terms=terms, added=added)

    def penalty(self, now: Parameters, received: Parameters, progress: float) -> Tensor | None:
        """The sum of all terms' values, in their order; None if none has one. See ``LossTerm.value``."""
        shared = {name: tensor for name, tensor in now.items() if name not in self.own}
        values = [term.value(now, received, progress) for term in self.terms]
        values += [term.value(shared, received, progress) for term in self.added]
        present = [value for value in values if value is not None]
        return reduce(operator.add, present) if present else None
