"""A message on its way from the SuperNode of this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from fedmllm.errors import RunError

_LOG = logging.getLogger("fedmllm.site")
POLL = 0.1
"""Seconds between two looks for a message."""
_CONTENT = 7200.0
"""Seconds for which a message's content is waited for, as the SuperNode waits for it."""
_LOST = 10.0
"""Seconds after which a message that may have been handed over to a broken connection was."""


class AbandonedError(Exception):
    """The content of a message will not come.

    Args:
        token: of the task that came instead; empty for none.
    """

    def __init__(self, token: str) -> None:
        super().__init__("its run ended before its content was there")
        self.token = token


class LostError(Exception):
    """A message was handed over, and cannot be read or is not here. Its task is left unfinished."""


class Incoming:
    """A task's message, which is there only once its content is.

    The SuperNode tells of a task before it has the message, and of the message before its content; it has all of the content at once. It has a new
    task only when it is done with the one before, so one that comes while content is waited for says that this content will not.

    Args:
        own: the connection of the task.
    """

    def __init__(self, own: Any) -> None:
        self._own = own
        self._found: Any = None
        self._lost = float("inf")

    def message(self, another: Callable[[], str]) -> Any:
        """The message, waited for.

        Args:
            another: looks for another task; its token, empty for none.

        Raises:
            AbandonedError: if its content will not come.
            LostError: if it was handed over, and cannot be read or is not here.
            RunError: if its content has not come for long.
        """
        begun, told = time.monotonic(), False
        while not self._there():
            if token := another():
                raise AbandonedError(token)
            if (waited := time.monotonic() - begun) > _CONTENT:
                raise RunError(f"a message's content has not come within {_CONTENT:g} s")
            if waited > _LOST and not told:
                told = True
                _LOG.info("the content of a message is waited for, %g s at most", _CONTENT)
            time.sleep(POLL)
        return self._read()

    def _there(self) -> bool:
        """Whether it is there with its content."""
        if self._found is None:
            self._look()
        return self._found is not None and self._complete()

    def _look(self) -> None:
        """Ask for it. It is handed over once: where a try failed, and later ones find nothing for long, that one was handed it."""
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
            raise LostError("the connection broke as it was handed over")

    def _complete(self) -> bool:
        """Whether the content is there.

        Raises:
            AbandonedError: if the SuperNode could not fetch it.
        """
        from flwr.proto.message_pb2 import PullObjectRequest

        run, root = self._found.messages_list[0].metadata.run_id, self._found.message_object_trees[0].object_id
        told = self._own.PullObject(PullObjectRequest(run_id=run, object_id=root))
        if not told.object_found:
            raise AbandonedError("")
        return bool(told.object_available)

    def _read(self) -> Any:
        """With its content, which the SuperNode is told to delete."""
        import httpx
        from flwr.app import Message
        from flwr.proto.node_pb2 import Node
        from flwr.supercore.inflatable.inflatable_protobuf_utils import (
            make_confirm_message_received_fn_protobuf,
            make_pull_object_fn_protobuf,
        )
        from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree

        told, tree = self._found.messages_list[0].metadata, self._found.message_object_trees[0]
        node, run = Node(node_id=told.dst_node_id), told.run_id
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
