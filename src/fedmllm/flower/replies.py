"""Answers that lie on a SuperLink, or are on their way to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.app import Message

ENVELOPE = 1 << 20
"""Bytes that Flower's message may have beside what is enclosed in it."""


class Reply:
    """An answer, whose pieces are fetched as they come.

    A SuperLink tells of an answer when its site begins to send it. Flower's own Grid then waits for the pieces, for as long as a slow site takes and for
    minutes where one dies while it sends, whatever the deadline, and looks for them ever more rarely. This looks once, and keeps what it finds.

    Args:
        client: the connection to the SuperLink.
        message: what it tells of the answer.
        tree: names of the pieces.
        largest: bytes of its content at most.
    """

    def __init__(self, client: Any, message: Any, tree: Any, largest: int) -> None:
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        self._client, self._run, self._name = client, message.metadata.run_id, tree.object_id
        # Last the one that is sent first.
        self._missing = [piece.object_id for piece in iterate_object_tree(tree)][::-1]
        self._there: dict[str, bytes] = {}
        self._largest, self._size = largest + ENVELOPE, 0

    def complete(self) -> bool:
        """Whether all is there.

        Raises:
            ValueError: if a piece will not come, or it is too large.
        """
        from flwr.proto.message_pb2 import PullObjectRequest

        while self._missing:
            name = self._missing[-1]
            told = self._client.PullObject(PullObjectRequest(node=self._node, run_id=self._run, object_id=name))
            if not told.object_found:
                raise ValueError("a part of its answer is lost; it may have ended while it sent")
            if not told.object_available:
                return False
            self._there[self._missing.pop()] = told.object_content
            self._size += len(told.object_content)
            if self._size > self._largest:
                raise ValueError(f"its answer has more bytes than {self._largest:,}")
        return True

    @property
    def _node(self) -> Any:
        from flwr.common.constant import SUPERLINK_NODE_ID
        from flwr.proto.node_pb2 import Node

        return Node(node_id=SUPERLINK_NODE_ID)

    def message(self) -> Message:
        """The answer, of which nothing is kept here."""
        from flwr.app import Message
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        pieces, self._there = self._there, {}
        found = inflate_object_from_contents(self._name, pieces)
        if not isinstance(found, Message):
            raise ValueError("its answer is no message")
        return found

    def forget(self) -> None:
        """Have it deleted from the SuperLink, whose database lets nobody write meanwhile, for seconds where it is large."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest

        told = ConfirmMessageReceivedRequest(node=self._node, run_id=self._run, message_object_id=self._name)
        self._client.ConfirmMessageReceived(told)
