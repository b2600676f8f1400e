"""The interface of an engine, which runs a method's client rule in this process or on remote clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedmllm.algorithms import Algorithm, Chain, ServerState, UpdateTransform
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.privacy.secagg.messages import Message, RoundId
from fedmllm.types import BASE, Accepted, Answer, Broadcast, ClientFailure, Metrics, Sample, Slots, Weights


@dataclass(frozen=True)
class Assignment:
    """The task that clients perform on one server state.

    Attributes:
        broadcast: what clients receive.
        algorithm: the method, which defines the client rule.
        learning_rate: the round's learning rate.
        seed: the experiment's seed.
        states: what each client keeps between rounds.
        ranks: LoRA ranks of clients whose rank differs from the server's.
        transforms: the experiment's update transforms, applied after the method's own.
        deadline: seconds after which answers no longer count; None for no limit.
        accepted: the rounds in which the server accepted each client's update; a client reads what it kept from the last of them.
        secure: the round of secure aggregation for which clients hold their updates back; None if they send them.
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
    secure: RoundId | None = None

    @property
    def chain(self) -> Chain:
        """All update transforms: first the method's, then the experiment's."""
        return Chain((*self.algorithm.transforms, *self.transforms))

    def kept(self, client: str) -> Slots:
        """Return what a client kept from its last accepted update."""
        return self.states.load(client, self.accepted.get(client, ()))

    def keep(self, client: str, slots: Slots) -> None:
        """Save what a client keeps from this round. It counts only if the server accepts the client's update."""
        self.states.save(client, self.broadcast.round_num, slots, self.accepted.get(client, ()))

    def personal(self, client: str) -> Weights:
        """Return the client's personalized model, or the global weights if the method has no personalized models."""
        broadcast = self.broadcast
        state = ServerState(broadcast.weights, broadcast.round_num, {BASE: broadcast.base})
        return self.algorithm.personal(state, self.kept(client))


Scorer = Callable[[Weights, Weights], Metrics]
"""(trainable weights, change merged into the frozen weights) -> scores."""


@dataclass(frozen=True)
class Split:
    """A split on which models are scored.

    Attributes:
        score: scores a model on the split's samples on this machine.
        name: the name by which remote clients know the split: empty for the test split, ``flower.facts.VALIDATION``, or a copy of the test split
            as in ``evaluation.tested``.
        metric: the metric of the score; remote clients must use the same one.
    """

    score: Scorer
    name: str = ""
    metric: str = ""


@dataclass(frozen=True)
class SecureStage:
    """One stage of a session of secure aggregation.

    Attributes:
        round_id: the round.
        name: the stage, one of ``privacy.secagg.messages.STAGES``.
        messages: the server's messages by client.
        largest: the maximum size of an answer in bytes.
        deadline: seconds after which answers no longer count; None for no limit.
    """

    round_id: RoundId
    name: str
    messages: Mapping[str, Message]
    largest: int
    deadline: float | None = None


class Engine(Protocol):
    """Trains clients. The caller submits tasks and takes answers when it needs them. In between, a client is outstanding."""

    @property
    def remote(self) -> bool:
        """Whether clients and their personalized models are on other machines. Answers of remote clients arrive in no fixed order."""
        ...

    def submit(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> None:
        """Submit a training task to clients, none of which may be outstanding.

        Args:
            assignment: the task.
            clients: training samples by client; empty for a remote client, which holds its own.
        """
        ...

    def completed(self, order: Sequence[str] | None = None) -> Iterator[Answer]:
        """Yield exactly one answer per outstanding client.

        Args:
            order: the clients to take answers from, in this order; the iterator blocks until each answers. The listed clients may train in
                parallel. None yields all answers as they arrive, until no client is outstanding. The caller may abandon the iterator at any time;
                clients not yielded yet stay outstanding.
        """
        ...

    def carry(self, stage: SecureStage) -> Iterator[tuple[str, Message | ClientFailure]]:
        """Carry the messages of a stage of secure aggregation to clients, and yield exactly one answer or failure of each.

        Args:
            stage: the stage.
        """
        ...

    def cancel(self) -> None:
        """Drop all outstanding clients and their answers."""
        ...

    def scores(self, assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
        """Return the scores of clients' personalized models on a split, by client, given the server state in the assignment.

        Remote clients that do not report a score are missing from the result.

        Raises:
            FederationError: if no client reports a score.
        """
        ...


def scores_here(assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
    """Score clients' personalized models on this machine, as ``Engine.scores`` does."""
    return {client: split.score(assignment.personal(client), assignment.broadcast.base) for client in clients}
