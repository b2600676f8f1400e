"""The same loop over Flower: its Grid carries messages to workers that hold the model and the data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmllm.engine.base import Assignment, Split, scores_here
from fedmllm.errors import FederationError, listing
from fedmllm.flower.carrier import POLL, POLL_SHARE, Carrier, TimeLeft, ask, look, receive, send
from fedmllm.flower.facts import Scores, read_word
from fedmllm.flower.frozen import BaseHistory
from fedmllm.flower.messages import expected, read_answer, write_task
from fedmllm.types import Answer, ClientFailure, Metrics, Sample


@dataclass(frozen=True)
class _Submitted:
    """A client that was submitted and whose task is not on its way yet."""

    assignment: Assignment
    node: int | None
    time_left: TimeLeft
    unreachable: str = "not connected"


@dataclass(frozen=True)
class _Sent:
    """A client whose task is on its way: the message's id, or why there is none."""

    assignment: Assignment
    message_id: str | ClientFailure
    time_left: TimeLeft


@dataclass
class FlowerEngine:
    """Sends clients' tasks to nodes, and takes their answers one at a time.

    Answers that come before they are asked for wait outside of this process where Flower has a server of its own.

    Attributes:
        grid: Flower's.
        stage: what the rounds belong to.
        about: what workers are told beside.
        nodes: where clients can be reached now, by name; those that cannot are left out. It raises a ``ConnectionError`` where what leads to them is gone.
        history: of the change to the frozen weights.
        ahead: tasks that are on their way at once; None for all. Where messages are held in this process, this bounds their memory.
        remote: whether clients are at sites, with the models that they keep.
    """

    grid: Carrier
    stage: str
    about: Mapping[str, Any]
    nodes: Callable[[Sequence[str]], Mapping[str, int]]
    history: BaseHistory
    ahead: int | None = None
    remote: bool = False
    _submitted: dict[str, _Submitted] = field(default_factory=dict, init=False)
    _sent: dict[str, _Sent] = field(default_factory=dict, init=False)

    def submit(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> None:
        """Send the tasks, as many as may be on their way; the others follow as answers are taken."""
        self.history.note(assignment.broadcast)
        time_left, unreachable, nodes = TimeLeft(assignment.deadline), "not connected", dict[str, int]()
        try:
            nodes = dict(self.nodes(list(clients)))
        except ConnectionError as error:
            unreachable = str(error)
        self._submitted |= {name: _Submitted(assignment, nodes.get(name), time_left, unreachable) for name in clients}
        self._send_ahead()

    def completed(self, order: Sequence[str] | None = None) -> Iterator[Answer]:
        """Answers in the order asked for, or as they arrive."""
        if order is None:
            yield from self._as_they_arrive()
            return
        for name in order:
            if name not in self._sent:
                self._send(name)
            sent = self._sent[name]
            content = _received(self.grid, name, sent, self._largest(name))
            yield self._answer(name, content)

    def cancel(self) -> None:
        """Forget clients; answers that still come are not looked for."""
        self.grid.forget([sent.message_id for sent in self._sent.values() if isinstance(sent.message_id, str)])
        self._submitted.clear()
        self._sent.clear()

    def scores(self, assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
        """What clients' own models score where they are, by client; those that do not tell are left out.

        Raises:
            FederationError: if nobody tells.
        """
        if not self.remote:
            return scores_here(assignment, clients, split)
        round_num = assignment.broadcast.round_num
        told: list[Scores | ClientFailure] = []
        for name, content in self._asked(assignment, clients, {**self.about, "tested": split.name}):
            told.append(content if isinstance(content, ClientFailure) else _scores(content, name, split.metric, round_num))
        if found := {word.client: word.metrics for word in told if isinstance(word, Scores)}:
            return found
        reasons = listing(f"{word.client}: {word.reason}" for word in told if isinstance(word, ClientFailure))
        raise FederationError(f"after round {round_num} no client returned a score for its personalized model:\n{reasons}")

    def _asked(
        self, assignment: Assignment, clients: Sequence[str], about: Mapping[str, Any]
    ) -> Iterator[tuple[str, bytes | ClientFailure]]:
        """Clients' answers to the question for their scores."""
        self.history.note(assignment.broadcast)
        try:
            nodes = self.nodes(clients)
        except ConnectionError as error:
            return iter([(name, ClientFailure(name, str(error), reached=False)) for name in clients])
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
        message_id: str | ClientFailure = ClientFailure(name, work.unreachable, reached=False)
        if work.node is not None:
            content = self._task(work.assignment, name, self.about)
            message_id = send(self.grid, "train", name, content, work.node, work.time_left)
        self._sent[name] = _Sent(work.assignment, message_id, work.time_left)

    def _as_they_arrive(self) -> Iterator[Answer]:
        """Look at all clients that are on their way, again and again. Whoever is late is a failure, so that it ends where there is a deadline."""
        pause = POLL[0]
        while self._sent:
            found = False
            for name, sent in list(self._sent.items()):
                content = _looked(self.grid, name, sent, self._largest(name))
                if content is not None:
                    found = True
                    yield self._answer(name, content)
            pause = POLL[0] if found else min(pause * (1 + POLL_SHARE), POLL[1])
            if not found:
                time.sleep(pause)

    def _largest(self, name: str) -> int:
        return expected(self._sent[name].assignment, name).largest

    def _answer(self, name: str, content: bytes | ClientFailure) -> Answer:
        """What a client sent; it is outstanding no longer, and the next task is sent."""
        assignment = self._sent.pop(name).assignment
        self._send_ahead()
        if isinstance(content, ClientFailure):
            return content
        answer = read_answer(content, name, expected(assignment, name))
        self.history.answered(name, assignment.broadcast, isinstance(answer, ClientFailure))
        return answer


def _scores(content: bytes, client: str, metric: str, round_num: int) -> Scores | ClientFailure:
    told = read_word(content, client, Scores)
    if isinstance(told, Scores) and told.metric != metric:
        return ClientFailure(client, f"its score is {told.metric}, the experiment's {metric}")
    if isinstance(told, Scores) and (told.round_num != round_num or "score" not in told.metrics):
        return ClientFailure(client, "its scores are of another round, or without the score itself")
    return told


def _received(grid: Carrier, client: str, sent: _Sent, largest: int) -> bytes | ClientFailure:
    """As ``_receive``; at once where nothing was sent."""
    if isinstance(sent.message_id, ClientFailure):
        return sent.message_id
    return receive(grid, client, sent.message_id, largest, sent.time_left)


def _looked(grid: Carrier, client: str, sent: _Sent, largest: int) -> bytes | ClientFailure | None:
    """As ``_look``; at once where nothing was sent."""
    if isinstance(sent.message_id, ClientFailure):
        return sent.message_id
    return look(grid, client, sent.message_id, largest, sent.time_left)
