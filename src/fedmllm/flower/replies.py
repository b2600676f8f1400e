"""Answers that a SuperLink holds or is receiving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr.app import Message

ENVELOPE = 1 << 20
"""Bytes that Flower's message may have in addition to its content."""


class Reply:
    """An answer whose pieces are fetched as they arrive.

    A SuperLink announces an answer when its site starts to send it. Flower's own Grid then blocks until all pieces arrive, regardless of the deadline:
    as long as a slow site takes, and for minutes if a site dies while it sends. It also checks less and less often. This class checks once per call and
    keeps the pieces that it finds.

    Args:
        client: the connection to the SuperLink.
        message: the SuperLink's announcement of the answer.
        tree: names of the pieces.
        largest: maximum size of the content in bytes.
    """

    def __init__(self, client: Any, message: Any, tree: Any, largest: int) -> None:
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        self._client, self._run, self._name = client, message.metadata.run_id, tree.object_id
        # The piece that is sent first comes last, because pieces are popped from the end.
        self._missing = [piece.object_id for piece in iterate_object_tree(tree)][::-1]
        self._there: dict[str, bytes] = {}
        self._largest, self._size = largest + ENVELOPE, 0

    def complete(self) -> bool:
        """Fetch the pieces that have arrived, and return whether the answer is complete.

        Raises:
            ValueError: if a piece is lost, or the answer is too large.
        """
        from flwr.proto.message_pb2 import PullObjectRequest

        while self._missing:
            name = self._missing[-1]
            response = self._client.PullObject(PullObjectRequest(node=self._node, run_id=self._run, object_id=name))
            if not response.object_found:
                raise ValueError("a piece of the answer is lost; the site may have stopped while it sent")
            if not response.object_available:
                return False
            self._there[self._missing.pop()] = response.object_content
            self._size += len(response.object_content)
            if self._size > self._largest:
                raise ValueError(f"the answer has more than {self._largest:,} bytes")
        return True

    @property
    def _node(self) -> Any:
        from flwr.common.constant import SUPERLINK_NODE_ID
        from flwr.proto.node_pb2 import Node

        return Node(node_id=SUPERLINK_NODE_ID)

    def message(self) -> Message:
        """Return the answer and drop its pieces."""
        from flwr.app import Message
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        pieces, self._there = self._there, {}
        found = inflate_object_from_contents(self._name, pieces)
        if not isinstance(found, Message):
            raise ValueError("the answer is not a Flower message")
        return found

    def forget(self) -> None:
        """Delete the answer from the SuperLink. This blocks writes to its database, for seconds if the answer is large."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest

        request = ConfirmMessageReceivedRequest(node=self._node, run_id=self._run, message_object_id=self._name)
        self._client.ConfirmMessageReceived(request)
