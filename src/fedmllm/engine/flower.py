"""The same loop over Flower: its Grid carries messages to workers that hold the model and the data."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from fedmllm.engine.frozen import BaseHistory
from fedmllm.engine.in_process import Assignment
from fedmllm.engine.messages import SLACK, expected, read_answer, write_task
from fedmllm.engine.words import Scores, read_word
from fedmllm.errors import FederationError, listing
from fedmllm.types import Answer, ClientFailure, Metrics, Sample

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.serverapp import Grid

_POLL = (0.02, 0.5)
"""Seconds between two looks for an answer, at first and at most."""
_POLL_SHARE = 0.05
"""Of the time that it has been waited for, which the next look comes later."""
_GRACE = 30.0
"""Seconds that a message outlives its round's deadline: then the answer of one that is late is dropped on the way."""
_NEVER = 30 * 24 * 3600.0
"""Seconds that a message lives without a deadline."""


def enclose(content: bytes) -> RecordDict:
    """Bytes as a record of Flower, which sends arrays in pieces and without a limit of size."""
    from flwr.app import Array, ArrayRecord, RecordDict

    array = Array(dtype="uint8", shape=(len(content),), stype="fedmllm.safetensors", data=content)
    return RecordDict({"content": ArrayRecord({"bytes": array})})


def enclosed(record: RecordDict, largest: int | None = None) -> bytes:
    """The opposite.

    Raises:
        ValueError: if it is something else, or more bytes than ``largest``.
    """
    try:
        content = bytes(record.array_records["content"]["bytes"].data)
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError("the message holds no record of ours") from error
    if largest is not None and len(content) > largest:
        raise ValueError(f"it has {len(content):,} bytes, {largest:,} are expected at most")
    return content


def of_words(client: str) -> int:
    """Bytes at most of an answer without tensors."""
    return SLACK


class Carrier(Protocol):
    """Brings messages to nodes, and their replies."""

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        """Send; the messages' ids."""
        ...

    def pull_messages(self, message_ids: list[str], largest: int) -> Iterable[Message]:
        """The replies that are there. One whose content has more bytes than ``largest`` may be refused, with a ``ValueError``, before it is held here."""
        ...


@dataclass(frozen=True)
class FlowerCarrier:
    """A Grid of Flower's as a carrier, whose messages are in this process anyway.

    Attributes:
        grid: Flower's.
    """

    grid: Grid

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        """Send."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: list[str], largest: int) -> Iterable[Message]:
        """Of any size."""
        return self.grid.pull_messages(message_ids)


@dataclass(frozen=True)
class FlowerEngine:
    """Sends a round's tasks to nodes, and takes the answers in the clients' order, one at a time.

    Attributes:
        grid: Flower's.
        stage: what the rounds belong to.
        about: what workers are told beside.
        nodes: where clients can be reached now, by name; those that cannot are left out. It raises a ``ConnectionError`` where what leads to them is gone.
        history: of the change to the frozen weights.
        ahead: tasks that are on their way at once; None for all. Where messages are held in this process, this bounds their memory.
    """

    grid: Carrier
    stage: str
    about: Mapping[str, Any]
    nodes: Callable[[Sequence[str]], Mapping[str, int]]
    history: BaseHistory
    ahead: int | None = None

    def map_clients(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[Answer]:
        """Answers in the clients' order. Those that come earlier wait outside of this process where Flower has a server of its own."""
        for name, content in self._ask("train", assignment, list(clients), self.about, lambda name: expected(assignment, name).largest):
            if isinstance(content, ClientFailure):
                yield content
                continue
            answer = read_answer(content, name, expected(assignment, name))
            self.history.answered(name, assignment.broadcast, isinstance(answer, ClientFailure))
            yield answer

    def _ask(
        self, kind: str, assignment: Assignment, clients: Sequence[str], about: Mapping[str, Any], largest: Callable[[str], int] = of_words
    ) -> Iterator[tuple[str, bytes | ClientFailure]]:
        """Send each client its task, and take what it answers."""
        broadcast, history = assignment.broadcast, self.history
        history.note(broadcast)
        contents = ((name, write_task(assignment, self.stage, name, about, history.missing(name, broadcast))) for name in clients)
        try:
            nodes = self.nodes(clients)
        except ConnectionError as error:
            return iter([(name, ClientFailure(name, str(error), reached=False)) for name in clients])
        return ask(self.grid, kind, contents, nodes, assignment.deadline, largest, self.ahead)

    def scores(self, assignment: Assignment, clients: Sequence[str], metric: str, copy: str = "") -> dict[str, Metrics]:
        """What clients' own models score where they are, by client; those that do not tell are left out.

        Args:
            assignment: as if the next round began.
            clients: whom to ask.
            metric: the experiment's, by which all must score.
            copy: of the test split, as in ``evaluation.tested``; empty for the complete one, ``VALIDATION`` for the validation part.

        Raises:
            FederationError: if nobody tells.
        """
        round_num = assignment.broadcast.round_num
        told: list[Scores | ClientFailure] = []
        for name, content in self._ask("evaluate", assignment, clients, {**self.about, "tested": copy}):
            told.append(content if isinstance(content, ClientFailure) else _scores(content, name, metric, round_num))
        if found := {word.client: word.metrics for word in told if isinstance(word, Scores)}:
            return found
        reasons = listing(f"{word.client}: {word.reason}" for word in told if isinstance(word, ClientFailure))
        raise FederationError(f"after round {round_num} no client tells the score of its own model:\n{reasons}")


def _scores(content: bytes, client: str, metric: str, round_num: int) -> Scores | ClientFailure:
    told = read_word(content, client, Scores)
    if isinstance(told, Scores) and told.metric != metric:
        return ClientFailure(client, f"its score is {told.metric}, the experiment's {metric}")
    if isinstance(told, Scores) and (told.round_num != round_num or "score" not in told.metrics):
        return ClientFailure(client, "its scores are of another round, or without the score itself")
    return told


def ask(
    grid: Carrier,
    kind: str,
    contents: Iterable[tuple[str, bytes]],
    nodes: Mapping[str, int],
    deadline: float | None,
    largest: Callable[[str], int] = of_words,
    ahead: int | None = None,
) -> Iterator[tuple[str, bytes | ClientFailure]]:
    """Send every client its message, one at a time, so that no more than one is held here; then take the answers in the same order.

    Args:
        grid: Flower's. Where what it leads to is gone it raises a ``ConnectionError``, and is asked again until the deadline.
        kind: of message.
        contents: what to send, by client.
        nodes: where clients are reached.
        deadline: seconds until which answers are waited for; None for ever.
        largest: bytes of a client's answer at most.
        ahead: messages that are on their way at once; None for all. The next is sent when the first of them is answered.
    """
    time_left = _TimeLeft(deadline)
    sent = ((client, _send(grid, kind, client, content, nodes.get(client), time_left)) for client, content in contents)
    waiting = deque(islice(sent, ahead))
    while waiting:
        client, message_id = waiting.popleft()
        if isinstance(message_id, ClientFailure):
            yield client, message_id
        else:
            yield client, _receive(grid, client, message_id, largest(client), time_left)
        waiting.extend(islice(sent, 1))


class _TimeLeft:
    """Until a deadline, counted from now; None for none."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline, self._begun = deadline, time.monotonic()

    @property
    def late(self) -> bool:
        """Whether it is over."""
        return self.deadline is not None and time.monotonic() - self._begun > self.deadline


def _send(grid: Carrier, kind: str, client: str, content: bytes, node: int | None, time_left: _TimeLeft) -> str | ClientFailure:
    """Try until it is sent, or it is too late."""
    from flwr.app import Message

    if node is None:
        return ClientFailure(client, "not connected", reached=False)
    life = _NEVER if time_left.deadline is None else time_left.deadline + _GRACE
    # The same in every try: what it leads to knows it again, and the client is not asked twice.
    message = Message(enclose(content), dst_node_id=node, message_type=kind, ttl=life)
    while True:
        late = time_left.late
        try:
            taken = list(grid.push_messages([message]))
        except ConnectionError as error:
            if late or time_left.deadline is None:
                return ClientFailure(client, str(error))
            time.sleep(_POLL[1])
            continue
        return taken[0] if taken and taken[0] else ClientFailure(client, "Flower did not take the message", reached=False)


def _receive(grid: Carrier, client: str, message_id: str, largest: int, time_left: _TimeLeft) -> bytes | ClientFailure:
    """Look until the answer is there, or it is too late."""
    begun = time.monotonic()
    while True:
        # Asked before the clock: what is there when time is up still counts, however long the ones before it took.
        late, trouble = time_left.late, ""
        try:
            for reply in grid.pull_messages([message_id], largest):
                return ClientFailure(client, f"Flower: {reply.error.reason}") if reply.has_error() else enclosed(reply.content, largest)
        except ConnectionError as error:
            if time_left.deadline is None:
                return ClientFailure(client, str(error))
            trouble = f"; {error}"
        except ValueError as error:
            return ClientFailure(client, str(error))
        if late:
            return ClientFailure(client, f"no answer within the deadline of {time_left.deadline:g} s{trouble}")
        # A look costs the SuperLink work, which sends and receives meanwhile.
        time.sleep(min(max(_POLL[0], _POLL_SHARE * (time.monotonic() - begun)), _POLL[1]))
