"""Receives a message from the SuperNode on this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from fedmllm.errors import RunError

_LOG = logging.getLogger("fedmllm.site")
POLL = 0.1
"""Seconds between two checks for a message."""
_CONTENT = 7200.0
"""Seconds to wait for a message's content, the same as the SuperNode's limit."""
_LOST = 10.0
"""Seconds after which a message that may have been delivered to a broken connection counts as lost."""


class AbandonedError(Exception):
    """The content of a message will not arrive.

    Args:
        token: token of the task that arrived instead; empty for none.
    """

    def __init__(self, token: str) -> None:
        super().__init__("its run ended before its content arrived")
        self.token = token


class LostError(Exception):
    """The SuperNode delivered a message that cannot be read or did not arrive. Its task stays unfinished."""


class Incoming:
    """The message of a task, which is complete once its content has arrived.

    The SuperNode announces a task before it has the message, and the message before it has the content; the content then arrives all at once. It
    announces a new task only when it is done with the previous one. A new task during the wait therefore means that the content will not arrive.

    Args:
        own: the task's connection to the SuperNode.
    """

    def __init__(self, own: Any) -> None:
        self._own = own
        self._found: Any = None
        self._lost = float("inf")

    def message(self, another: Callable[[], str]) -> Any:
        """Wait for the message and return it.

        Args:
            another: checks for another task and returns its token; empty for none.

        Raises:
            AbandonedError: if the content will not arrive.
            LostError: if the SuperNode delivered the message, but it cannot be read or did not arrive.
            RunError: if the content has not arrived within the limit.
        """
        begun, logged = time.monotonic(), False
        while not self._there():
            if token := another():
                raise AbandonedError(token)
            if (waited := time.monotonic() - begun) > _CONTENT:
                raise RunError(f"the content of a message did not arrive within {_CONTENT:g} s")
            if waited > _LOST and not logged:
                logged = True
                _LOG.info("Waiting for the content of a message, for at most %g s", _CONTENT)
            time.sleep(POLL)
        return self._read()

    def _there(self) -> bool:
        """Return whether the message has arrived with its content."""
        if self._found is None:
            self._look()
        return self._found is not None and self._complete()

    def _look(self) -> None:
        """Ask for the message. It is delivered only once: if an attempt failed and later ones find nothing, the failed one had received it."""
        import httpx
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest

        late = time.monotonic() > self._lost
        try:
            found = self._own.PullMessages(PullAppMessagesRequest())
        except httpx.TransportError:
            if late:
                raise
            self._lost = min(self._lost, time.monotonic() + _LOST)
            return
        if found.messages_list:
            self._found = found
        elif late:
            raise LostError("the connection broke during delivery")

    def _complete(self) -> bool:
        """Return whether the content has arrived.

        Raises:
            AbandonedError: if the SuperNode could not fetch it.
        """
        from flwr.proto.message_pb2 import PullObjectRequest

        run, root = self._found.messages_list[0].metadata.run_id, self._found.message_object_trees[0].object_id
        response = self._own.PullObject(PullObjectRequest(run_id=run, object_id=root))
        if not response.object_found:
            raise AbandonedError("")
        return bool(response.object_available)

    def _read(self) -> Any:
        """Return the message with its content, and let the SuperNode delete it."""
        import httpx
        from flwr.app import Message
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_protobuf_utils import (
            make_confirm_message_received_fn_protobuf,
            make_pull_object_fn_protobuf,
        )
        from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

        metadata, tree = self._found.messages_list[0].metadata, self._found.message_object_trees[0]
        node, run = Node(node_id=metadata.dst_node_id), metadata.run_id
        pull = make_pull_object_fn_protobuf(self._own.PullObject, node, run)
        confirm = make_confirm_message_received_fn_protobuf(self._own.ConfirmMessageReceived, node, run)
        try:
            message = pull_and_inflate_object_from_tree(tree, pull, confirm, return_type=Message)
        except httpx.HTTPError:
            raise
        except Exception as error:
            raise LostError(f"it cannot be read: {type(error).__name__}: {error}") from error
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message
