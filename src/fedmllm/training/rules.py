"""How a method changes local training, expressed as data."""

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
    """The result of local training.

    Attributes:
        weights: all tensors, including those that did not train.
        received: the weights that the client received.
        metrics: ``steps``, and ``loss``, the mean over steps in nats per token, unless no step was taken or steps were private.
        gradient: mean over steps of the gradient before editing and clipping; empty unless the rule requests it.
    """

    weights: Weights
    received: Weights
    metrics: Metrics
    gradient: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Upload:
    """What a client sends and keeps after local training.

    Attributes:
        weights: the weights to upload; the update is their difference from the weights received.
        extras: extra tensor sets for the server, with the names and shapes of the update.
        keeps: what the client keeps for its next local training.
    """

    weights: Weights
    extras: Slots = field(default_factory=dict)
    keeps: Slots = field(default_factory=dict)


def plain_upload(result: LocalResult) -> Upload:
    """Upload the trained weights as they are, and keep nothing."""
    return Upload(result.weights)


@dataclass(frozen=True)
class LocalRule:
    """How a method departs from plain local training. The default values give FedAvg.

    Attributes:
        terms: loss terms of the method.
        added: loss terms of strategies. Their penalties act on shared tensors only and exclude those in ``own``.
        edit_gradient: changes a gradient before clipping: (name, gradient) -> gradient.
        trains: returns whether the tensor of a given name trains; None if all do.
        start: tensors that start from these values instead of the values received.
        own: names of the tensors that the client does not share. The values received for them are meaningless, so no strategy may pull
            toward them.
        records_gradient: whether to compute ``LocalResult.gradient``.
        finish: turns the result into what the client sends and keeps.
        personal: the rule of a second training on the same samples, whose weights the client keeps under ``personal``.
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
        """The method's terms, then those of strategies."""
        return (*self.terms, *self.added)

    def with_term(self, term: LossTerm) -> LocalRule:
        """Return the rule with one more term in ``added``. Strategies use it."""
        return replace(self, added=(*self.added, term))

    def without(self, kind: type[LossTerm]) -> LocalRule:
        """Return the rule without the terms of a class, whether the method or a strategy added them."""
        terms, added = (tuple(term for term in some if not isinstance(term, kind)) for some in (self.terms, self.added))
        return replace(self, terms=terms, added=added)

    def penalty(self, now: Parameters, received: Parameters, progress: float) -> Tensor | None:
        """Return the sum of all terms' penalties, in order; None if no term has one. See ``LossTerm.value``."""
        shared = {name: tensor for name, tensor in now.items() if name not in self.own}
        values = [term.value(now, received, progress) for term in self.terms]
        values += [term.value(shared, received, progress) for term in self.added]
        present = [value for value in values if value is not None]
        return reduce(operator.add, present) if present else None
