"""Flower's SuperNode without its process: its state, handlers and fetching, and messages for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto import runtime_pb2
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.servicer.runtime import runtime_handlers as common
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeStateFactory

NODE = 7


class Node:
    """Flower's SuperNode, which fetches from a scripted server."""

    def __init__(self) -> None:
        objects = ObjectStoreFactory()
        self.factory = NodeStateFactory(objects)
        self.state, self.store = self.factory.state(), objects.store()
        self.state.set_node_id(NODE)
        app = self.state.store_fab(Fab("", b"", {}))
        for number in (1, 2):
            run = replace(Run.create_empty(number), fab_hash=app, series_id=number)
            self.state.store_run(run)
            context = Context(run_id=number, node_id=NODE, node_config={}, state=RecordDict(), run_config={})
            self.state.set_run_series_context(run.series_id, context)

    def fetch(self, message: Message, pull: Callable[[str], bytes] | None = None) -> None:
        """Fetch a message; ``pull`` replaces the way its content is loaded."""
        contents = {name: thing.deflate() for name, thing in get_all_nested_objects(message).items()}
        start_client_internal._pull_and_store_message(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (message, get_object_tree(message)),
            get_run=Run.create_empty,
            get_fab=lambda name, run: Fab("", b"", {}),
            pull_object=lambda run, name: contents[name] if pull is None else pull(name),
            confirm_message_received=lambda run, name: None,
            trusted_entities=None,
        )

    def acquire(self) -> str:
        request = runtime_pb2.AcquireTaskRequest(supported_task_types=["flwr-clientapp"])
        return str(common.acquire_task(request, self.state).token)

    def replies(self) -> list[Message]:
        return list(self.state.get_messages_legacy(is_reply=True))


def sent(run: int, words: str = "hello") -> Message:
    content = RecordDict({"words": ConfigRecord({"words": words})})
    message = Message(content, dst_node_id=NODE, message_type="query")
    message.metadata.__dict__["_run_id"] = run
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def echo() -> ClientApp:
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        if message.content["words"]["words"] == "fail":  # type: ignore[index]
            raise OSError("/wards/7 is not there")
        return Message(message.content, reply_to=message)

    return app
