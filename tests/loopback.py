"""Flower's Grid without processes or network: the real app answers each message at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

Tamper = Callable[[Message], Message | None]
"""A change to a reply on its way; None loses the reply."""


class LoopbackGrid(Grid):
    def __init__(self, app: ClientApp, tamper: Tamper = lambda reply: reply) -> None:
        # Flower sets these when it starts the process that receives a Grid.
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self._app, self._tamper = app, tamper
        self._replies: dict[str, Message | None] = {}
        self.sent: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            self.sent.append(message)
            message.metadata.__dict__["_message_id"] = str(len(self.sent))
            context = Context(run_id=1, node_id=message.metadata.dst_node_id, node_config={}, state=RecordDict(), run_config={})
            self._replies[str(len(self.sent))] = self._tamper(self._app(message, context))
            names.append(str(len(self.sent)))
        return names

    def pull_messages(self, message_ids: Iterable[str], largest: int | None = None) -> Iterable[Message]:
        found = [self._replies.get(name) for name in message_ids]
        return [reply for reply in found if reply is not None]

    def forget(self, message_ids: Iterable[str]) -> None: ...
    def set_run(self, run: Any) -> None: ...
    @property
    def run(self) -> Any: ...
    def create_message(self, *args: Any, **kwargs: Any) -> Any: ...
    def get_node_ids(self) -> Iterable[int]: ...  # type: ignore[empty-body]
    def send_and_receive(self, *args: Any, **kwargs: Any) -> Any: ...


@contextmanager
def loopback(app: ClientApp, nodes: int, cpus: float, gpus: float, tamper: Tamper = lambda reply: reply) -> Iterator[Any]:
    """A replacement for ``simulation``."""
    yield LoopbackGrid(app, tamper), list(range(1, nodes + 1))
