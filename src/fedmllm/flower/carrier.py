"""Messages to nodes and their answers, through whatever carries them: sent until they are taken, looked for until a deadline."""

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
"""Seconds between two looks for an answer, at first and at most."""
POLL_SHARE = 0.05
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

    def forget(self, message_ids: Sequence[str]) -> None:
        """Keep nothing of replies that are not looked for any more."""
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

    def forget(self, message_ids: Sequence[str]) -> None:
        """Nothing is kept."""


class TimeLeft:
    """Until a deadline, counted from now; None for none."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline, self._begun = deadline, time.monotonic()

    @property
    def late(self) -> bool:
        """Whether it is over."""
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
    time_left = TimeLeft(deadline)
    sent = ((client, send(grid, kind, client, content, nodes.get(client), time_left)) for client, content in contents)
    waiting = deque(islice(sent, ahead))
    while waiting:
        client, message_id = waiting.popleft()
        if isinstance(message_id, ClientFailure):
            yield client, message_id
        else:
            yield client, receive(grid, client, message_id, largest(client), time_left)
        waiting.extend(islice(sent, 1))


def send(grid: Carrier, kind: str, client: str, content: bytes, node: int | None, time_left: TimeLeft) -> str | ClientFailure:
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
            time.sleep(POLL[1])
            continue
        return taken[0] if taken and taken[0] else ClientFailure(client, "Flower did not take the message", reached=False)


def receive(grid: Carrier, client: str, message_id: str, largest: int, time_left: TimeLeft) -> bytes | ClientFailure:
    """Look until the answer is there, or it is too late."""
    begun = time.monotonic()
    while (found := look(grid, client, message_id, largest, time_left)) is None:
        # A look costs the SuperLink work, which sends and receives meanwhile.
        time.sleep(min(max(POLL[0], POLL_SHARE * (time.monotonic() - begun)), POLL[1]))
    return found


def look(grid: Carrier, client: str, message_id: str, largest: int, time_left: TimeLeft) -> bytes | ClientFailure | None:
    """The answer, if it is there; why there will be none, if it is too late; None for neither."""
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
        grid.forget([message_id])
        return ClientFailure(client, str(error))
    if not late:
        return None
    grid.forget([message_id])
    return ClientFailure(client, f"no answer within the deadline of {time_left.deadline:g} s{trouble}")
