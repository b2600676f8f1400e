"""The Flower engine: Flower's Grid carries tasks to workers that hold the model and the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmllm.engine.base import Assignment, SecureStage, Split, scores_here
from fedmllm.errors import FederationError, listing
from fedmllm.flower.carrier import Carrier, TimeLeft, ask, look, pause, receive, send, unreachable
from fedmllm.flower.facts import Scores, read_message
from fedmllm.flower.frozen import BaseHistory
from fedmllm.flower.messages import SLACK, Expected, expected, read_answer, write_task
from fedmllm.flower.sessions import SESSION, read_up, write_stage
from fedmllm.privacy.secagg.messages import Message
from fedmllm.types import Answer, ClientFailure, Metrics, Sample


@dataclass(frozen=True)
class _Submitted:
    """A submitted client whose task has not been sent yet."""

    assignment: Assignment
    node: int
    time_left: TimeLeft


@dataclass(frozen=True)
class _Sent:
    """A client whose task was sent, with the message's id or the failure to send it, and the format of its answer."""

    assignment: Assignment
    message_id: str | ClientFailure
    time_left: TimeLeft
    expected: Expected


@dataclass
class FlowerEngine:
    """Sends clients' tasks to nodes and takes their answers one at a time.

    With a SuperLink, answers that the caller has not taken yet stay at the SuperLink and not in this process.

    Attributes:
        grid: carries the messages.
        stage: the stage's name.
        about: further values for the workers, e.g. the experiment's settings.
        nodes: client names -> node ids of those that can be reached now. Raises a ``ConnectionError`` if the connection to the nodes is lost.
        history: the change to the frozen weights over the rounds.
        ahead: maximum number of tasks under way at the same time; None for all. It limits memory if this process holds the messages.
        remote: whether clients and their personalized models are at sites.
        roster: the signed list of sites, which clients check before a session of secure aggregation; empty without it.
    """

    grid: Carrier
    stage: str
    about: Mapping[str, Any]
    nodes: Callable[[Sequence[str]], Mapping[str, int]]
    history: BaseHistory
    ahead: int | None = None
    remote: bool = False
    roster: str = ""
    _submitted: dict[str, _Submitted] = field(default_factory=dict, init=False)
    _sent: dict[str, _Sent] = field(default_factory=dict, init=False)

    def submit(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> None:
        """Send up to ``ahead`` tasks. The others follow as the caller takes answers."""
        self.history.note(assignment.broadcast)
        time_left, nodes, reason = TimeLeft(assignment.deadline), dict[str, int](), "not connected"
        try:
            nodes = dict(self.nodes(list(clients)))
        except ConnectionError as error:
            reason = str(error)
        for name in clients:
            if name in nodes:
                self._submitted[name] = _Submitted(assignment, nodes[name], time_left)
            else:
                self._sent[name] = _Sent(assignment, unreachable(name, reason), time_left, expected(assignment, name))
        self._send_ahead()

    def completed(self, order: Sequence[str] | None = None) -> Iterator[Answer]:
        """Yield answers in the given order, or as they arrive."""
        if order is None:
            yield from self._as_they_arrive()
            return
        for name in order:
            if name not in self._sent:
                self._send(name)
            sent = self._sent[name]
            yield self._answer(name, receive(self.grid, name, sent.message_id, sent.expected.largest, sent.time_left))

    def carry(self, stage: SecureStage) -> Iterator[tuple[str, Message | ClientFailure]]:
        """Send the messages of a stage of secure aggregation, and yield the answers."""
        names = list(stage.messages)
        try:
            nodes = self.nodes(names)
        except ConnectionError as error:
            yield from ((name, unreachable(name, str(error))) for name in names)
            return
        contents = ((name, write_stage(stage, name, self.roster)) for name in names)
        for name, content in ask(self.grid, SESSION, contents, nodes, stage.deadline, lambda client: SLACK + stage.largest, self.ahead):
            yield name, content if isinstance(content, ClientFailure) else read_up(content, name, stage)

    def cancel(self) -> None:
        """Drop all outstanding clients and ignore their answers."""
        self.grid.forget([sent.message_id for sent in self._sent.values() if isinstance(sent.message_id, str)])
        self._submitted.clear()
        self._sent.clear()

    def scores(self, assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
        """Return the scores of clients' personalized models, by client. Remote clients compute them; those that report none are omitted.

        Raises:
            FederationError: if no client reports a score.
        """
        if not self.remote:
            return scores_here(assignment, clients, split)
        round_num = assignment.broadcast.round_num
        messages: list[Scores | ClientFailure] = []
        for name, content in self._requested(assignment, clients, {**self.about, "tested": split.name}):
            messages.append(content if isinstance(content, ClientFailure) else _scores(content, name, split.metric, round_num))
        if found := {message.client: message.metrics for message in messages if isinstance(message, Scores)}:
            return found
        reasons = listing(f"{message.client}: {message.reason}" for message in messages if isinstance(message, ClientFailure))
        raise FederationError(f"after round {round_num} no client returned a score for its personalized model:\n{reasons}")

    def _requested(
        self, assignment: Assignment, clients: Sequence[str], about: Mapping[str, Any]
    ) -> Iterator[tuple[str, bytes | ClientFailure]]:
        """Request scores from clients and return their answers."""
        self.history.note(assignment.broadcast)
        try:
            nodes = self.nodes(clients)
        except ConnectionError as error:
            return iter([(name, unreachable(name, str(error))) for name in clients])
        contents = ((name, self._task(assignment, name, about)) for name in clients)
        return ask(self.grid, "evaluate", contents, nodes, assignment.deadline, ahead=self.ahead)

    def _task(self, assignment: Assignment, client: str, about: Mapping[str, Any]) -> bytes:
        return write_task(assignment, self.stage, client, about, self.history.missing(client, assignment.broadcast))

    def _send_ahead(self) -> None:
        while self._submitted and (self.ahead is None or len(self._sent) < self.ahead):
            self._send(next(iter(self._submitted)))

    def _send(self, name: str) -> None:
        """Send a client its task.

        Raises:
            LookupError: if the client is not outstanding.
        """
        if name not in self._submitted:
            raise LookupError(f"{name!r} is not outstanding")
        work = self._submitted.pop(name)
        content = self._task(work.assignment, name, self.about)
        message_id = send(self.grid, "train", name, content, work.node, work.time_left)
        self._sent[name] = _Sent(work.assignment, message_id, work.time_left, expected(work.assignment, name))

    def _as_they_arrive(self) -> Iterator[Answer]:
        """Poll all clients whose task was sent, and yield answers as they arrive. With a deadline this ends, because a late client is a failure."""
        last = time.monotonic()
        while self._sent:
            found = False
            for name, sent in list(self._sent.items()):
                content = look(self.grid, name, sent.message_id, sent.expected.largest, sent.time_left)
                if content is not None:
                    found = True
                    yield self._answer(name, content)
            if found:
                last = time.monotonic()
            else:
                pause(time.monotonic() - last)

    def _answer(self, name: str, content: bytes | ClientFailure) -> Answer:
        """Return a client's answer, mark it as no longer outstanding, and send the next task."""
        sent = self._sent.pop(name)
        self._send_ahead()
        if isinstance(content, ClientFailure):
            return content
        answer = read_answer(content, name, sent.expected)
        self.history.answered(name, sent.assignment.broadcast, isinstance(answer, ClientFailure))
        return answer


def _scores(content: bytes, client: str, metric: str, round_num: int) -> Scores | ClientFailure:
    message = read_message(content, client, Scores)
    if isinstance(message, Scores) and message.metric != metric:
        return ClientFailure(client, f"the client scored {message.metric}, the experiment's metric is {metric}")
    if isinstance(message, Scores) and (message.round_num != round_num or "score" not in message.metrics):
        return ClientFailure(client, "the scores belong to another round, or lack the field score")
    return message
