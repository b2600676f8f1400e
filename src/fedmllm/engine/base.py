"""What an engine is: it runs the method's client rule, wherever the clients are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedmllm.algorithms import Algorithm, Chain, ServerState, UpdateTransform
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.types import Accepted, Answer, Broadcast, Metrics, Sample, Slots, Weights


@dataclass(frozen=True)
class Assignment:
    """What clients are asked to do with one state of the server.

    Attributes:
        broadcast: what they receive.
        algorithm: the method, for its client rule.
        learning_rate: this round's.
        seed: the experiment's.
        states: what clients keep for themselves.
        ranks: clients' own LoRA ranks, where they differ from the server's.
        transforms: what happens to updates besides what the method has done to them.
        deadline: seconds within which answers count; None for no limit.
        accepted: of the server's state: from which round a client keeps what it does.
    """

    broadcast: Broadcast
    algorithm: Algorithm
    learning_rate: float
    seed: int
    states: ClientStates
    ranks: Mapping[str, int] = field(default_factory=dict)
    transforms: tuple[UpdateTransform, ...] = ()
    deadline: float | None = None
    accepted: Accepted = field(default_factory=dict)

    @property
    def chain(self) -> Chain:
        """All update transforms: the method's, then the experiment's."""
        return Chain((*self.algorithm.transforms, *self.transforms))

    def kept(self, client: str) -> Slots:
        """What a client kept from its last accepted update."""
        return self.states.load(client, self.accepted.get(client, ()))

    def keep(self, client: str, slots: Slots) -> None:
        """What it keeps of this one, should its update be accepted."""
        self.states.save(client, self.broadcast.round_num, slots, self.accepted.get(client, ()))

    def personal(self, client: str) -> Weights:
        """The weights that a client ends with: the global ones, unless the method gives it its own from what it keeps."""
        broadcast = self.broadcast
        state = ServerState(broadcast.weights, broadcast.round_num, {"base": broadcast.base})
        return self.algorithm.personal(state, self.kept(client))


Scorer = Callable[[Weights, Weights], Metrics]
"""(weights, what was merged into the frozen ones) -> scores."""


@dataclass(frozen=True)
class Split:
    """Samples that models are scored on.

    Attributes:
        score: scores a model on those that are here.
        name: what remote clients are asked for: empty for the test split, ``flower.facts.VALIDATION``, or a copy of the test split as in
            ``evaluation.tested``.
        metric: the score, by which remote clients must score too.
    """

    score: Scorer
    name: str = ""
    metric: str = ""


class Engine(Protocol):
    """Trains clients. Work is submitted, and answers are taken as they are wanted; between the two a client is outstanding."""

    @property
    def remote(self) -> bool:
        """Whether clients, and the models they keep, are on machines of their own; then answers come when they come."""
        ...

    def submit(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> None:
        """Ask clients, none of which is outstanding, to train. Samples are empty for clients that hold theirs elsewhere."""
        ...

    def completed(self, order: Sequence[str] | None = None) -> Iterator[Answer]:
        """Answers of outstanding clients, exactly one of each.

        Args:
            order: whose, and in which order: each is waited for. None for all as they arrive, until no client is outstanding. The iterator may be
                left at any time; what it has not yielded stays outstanding.
        """
        ...

    def cancel(self) -> None:
        """Forget all outstanding clients."""
        ...

    def scores(self, assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
        """The scores of the models that clients end with, by client, as if the assignment's round began; remote clients may not tell theirs.

        Raises:
            FederationError: if nobody tells.
        """
        ...


def scores_here(assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
    """``Engine.scores`` where what clients keep is on this machine."""
    return {client: split.score(assignment.personal(client), assignment.broadcast.base) for client in clients}
