"""Sends messages to nodes and receives their answers, retrying until a deadline."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from fedmllm.flower.messages import SLACK
from fedmllm.types import ClientFailure

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.serverapp import Grid

POLL = (0.02, 0.5)
"""Seconds between two checks for an answer: at first, and at most."""
POLL_SHARE = 0.05
"""Seconds between checks grow by this share of the time waited so far."""
_GRACE = 30.0
"""Seconds that a message lives beyond its round's deadline. After that, Flower drops the answer of a late client."""
_NEVER = 30 * 24 * 3600.0
"""Lifetime in seconds of a message without a deadline."""


def enclose(content: bytes) -> RecordDict:
    """Wrap bytes in a Flower record. Flower sends arrays in pieces, without a size limit."""
    from flwr.app import Array, ArrayRecord, RecordDict

    array = Array(dtype="uint8", shape=(len(content),), stype="fedmllm.safetensors", data=content)
    return RecordDict({"content": ArrayRecord({"bytes": array})})


def enclosed(record: RecordDict, largest: int | None = None) -> bytes:
    """Return the bytes in a record that ``enclose`` made.

    Raises:
        ValueError: if the record is not one of these, or holds more bytes than ``largest``.
    """
    try:
        content = bytes(record.array_records["content"]["bytes"].data)
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError("the message does not hold a fedmllm record") from error
    if largest is not None and len(content) > largest:
        raise ValueError(f"the answer has {len(content):,} bytes, expected at most {largest:,}")
    return content


def of_words(client: str) -> int:
    """Return the maximum size in bytes of an answer without tensors."""
    return SLACK


class Carrier(Protocol):
    """Carries messages to nodes, and their replies back."""

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        """Send messages and return their ids."""
        ...

    def pull_messages(self, message_ids: list[str], largest: int) -> Iterable[Message]:
        """Return the replies that have arrived.

        Args:
            message_ids: ids of the messages that the replies answer.
            largest: maximum size of a reply in bytes. A larger one may raise a ``ValueError`` before it is held in memory.
        """
        ...

    def forget(self, message_ids: Sequence[str]) -> None:
        """Drop replies that the caller no longer needs."""
        ...


@dataclass(frozen=True)
class FlowerCarrier:
    """Flower's Grid as a carrier, for a simulation, whose messages are in this process anyway.

    Attributes:
        grid: Flower's Grid.
    """

    grid: Grid

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        """Send messages and return their ids."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: list[str], largest: int) -> Iterable[Message]:
        """Return the replies that have arrived, of any size."""
        return self.grid.pull_messages(message_ids)

    def forget(self, message_ids: Sequence[str]) -> None:
        """Do nothing: this carrier keeps no replies."""


class TimeLeft:
    """Tracks a deadline in seconds from now; None for no deadline."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline, self._begun = deadline, time.monotonic()

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() - self._begun > self.deadline


def ask(
    grid: Carrier,
    kind: str,
    contents: Iterable[tuple[str, bytes]],
    nodes: Mapping[str, int],
    deadline: float | None,
    largest: Callable[[str], int] = of_words,
    ahead: int | None = None,
) -> Iterator[tuple[str, bytes | ClientFailure]]:
    """Send every client its message, then yield the answers in the same order. Only one message at a time is held in memory.

    Args:
        grid: carries the messages. If it raises a ``ConnectionError``, calls are retried until the deadline.
        kind: Flower's type of the messages.
        contents: (client, message content) pairs.
        nodes: node ids by client.
        deadline: seconds to wait for answers; None for no limit.
        largest: client -> maximum size of its answer in bytes.
        ahead: maximum number of messages under way at the same time; None for all. The next is sent when the first of them is answered.

    Yields:
        (client, content of its answer or a failure).
    """
    time_left = TimeLeft(deadline)
    sent = ((client, send(grid, kind, client, content, nodes.get(client), time_left)) for client, content in contents)
    outstanding = deque(islice(sent, ahead))
    while outstanding:
        client, message_id = outstanding.popleft()
        yield client, receive(grid, client, message_id, largest(client), time_left)
        outstanding.extend(islice(sent, 1))


def send(grid: Carrier, kind: str, client: str, content: bytes, node: int | None, time_left: TimeLeft) -> str | ClientFailure:
    """Send a client a message, retrying until the deadline. Returns the message id or a failure."""
    from flwr.app import Message

    if node is None:
        return unreachable(client)
    life = _NEVER if time_left.deadline is None else time_left.deadline + _GRACE
    # Every attempt sends the same message, so that the SuperLink recognizes it and the client does not get the task twice.
    message = Message(enclose(content), dst_node_id=node, message_type=kind, ttl=life)
    while True:
        late = time_left.late
        try:
            taken = list(grid.push_messages([message]))
        except ConnectionError as error:
            if late or time_left.deadline is None:
                return ClientFailure(client, str(error))
            time.sleep(POLL[1])
            continue
        return taken[0] if taken and taken[0] else ClientFailure(client, "Flower did not accept the message", reached=False)


def unreachable(client: str, reason: str = "not connected") -> ClientFailure:
    """Return the failure of a client that no message can be sent to."""
    return ClientFailure(client, reason, reached=False)


def receive(grid: Carrier, client: str, message_id: str | ClientFailure, largest: int, time_left: TimeLeft) -> bytes | ClientFailure:
    """Wait for a client's answer until the deadline. If the message could not be sent, return that failure."""
    begun = time.monotonic()
    while (found := look(grid, client, message_id, largest, time_left)) is None:
        pause(time.monotonic() - begun)
    return found


def pause(waited: float) -> None:
    """Sleep between two checks: the longer, the more seconds have passed without an answer."""
    # Each check costs work at the SuperLink, which transfers messages at the same time.
    time.sleep(min(max(POLL[0], POLL_SHARE * waited), POLL[1]))


def look(grid: Carrier, client: str, message_id: str | ClientFailure, largest: int, time_left: TimeLeft) -> bytes | ClientFailure | None:
    """Return the answer if it has arrived, a failure if the message was not sent or the deadline has passed, and None otherwise."""
    if isinstance(message_id, ClientFailure):
        return message_id
    # Read the clock before the check: an answer that has arrived by the deadline counts, even if taking earlier answers took long.
    late, trouble = time_left.late, ""
    try:
        for reply in grid.pull_messages([message_id], largest):
            return ClientFailure(client, f"Flower: {reply.error.reason}") if reply.has_error() else enclosed(reply.content, largest)
    except ConnectionError as error:
        if time_left.deadline is None:
            return ClientFailure(client, str(error))
        trouble = f"; {error}"
    except ValueError as error:
        grid.forget([message_id])
        return ClientFailure(client, str(error))
    if not late:
        return None
    grid.forget([message_id])
    return ClientFailure(client, f"no answer within the deadline of {time_left.deadline:g} s{trouble}")
