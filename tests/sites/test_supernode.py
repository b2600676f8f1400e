"""Taking messages from a SuperNode, against Flower's own: its state, its handlers and its fetching, without processes or a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto import runtime_pb2
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.object_store_factory import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.servicer.runtime import runtime_handlers as common
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.servicer.runtime import runtime_handlers as own

from fedmllm.sites import supernode
from fedmllm.sites.supernode import AbandonedError, answer

NODE = 7


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "_POLL", 0.01)


class Connection:
    """Of a task, as the interface gives it to the one that shows the token."""

    def __init__(self, node: Node, token: str) -> None:
        self._node, self._token = node, token

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        handler = getattr(own, "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_"))

        def call(request: Any) -> Any:
            task = self._node.state.get_task_by_token(self._token)
            if task is None:
                response = httpx.Response(401, request=httpx.Request("POST", "http://127.0.0.1/"))
                raise httpx.HTTPStatusError("the token is of no task", request=response.request, response=response)
            return handler(request, self._node.state, task)

        return call


class Node:
    """Flower's SuperNode, fetching from a server that is told what to give."""

    def __init__(self) -> None:
        factory = ObjectStoreFactory()
        self.state, self.store = NodeStateFactory(factory).state(), factory.store()
        self.state.set_node_id(NODE)
        app = self.state.store_fab(Fab("", b"", {}))
        for number in (1, 2):
            run = replace(Run.create_empty(number), fab_hash=app, series_id=number)
            self.state.store_run(run)
            context = Context(run_id=number, node_id=NODE, node_config={}, state=RecordDict(), run_config={})
            self.state.set_run_series_context(run.series_id, context)

    def fetch(self, message: Message, pull: Callable[[str], bytes] | None = None) -> None:
        """Take a message from the server, whose content it has, or gives as it is told."""
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


@pytest.fixture
def node() -> Node:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    return Node()


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


def nothing() -> str:
    return ""


def taken(node: Node, another: Callable[[], str] = nothing, token: str = "") -> None:
    answer("a", echo(), Connection(node, token or node.acquire()), another)


def test_a_message_is_answered(node: Node) -> None:
    message = sent(1)
    node.fetch(message)
    taken(node)
    (reply,) = node.replies()
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert not reply.has_error()


def test_what_the_app_raises_is_a_reply_that_tells_its_kind_only(node: Node) -> None:
    node.fetch(sent(1, "fail"))
    taken(node)
    (reply,) = node.replies()
    assert reply.has_error()
    assert reply.error.reason == "OSError"


def test_a_message_that_comes_after_its_task_is_waited_for(node: Node) -> None:
    """The SuperNode makes the task first. Who looked in between found nothing, and the SuperNode waited for ever for a reply."""
    node.state.create_task(task_type="flwr-clientapp", run_id=1, fab_hash=None)
    token = node.acquire()
    thread = threading.Thread(target=taken, args=(node, nothing, token))
    thread.start()
    time.sleep(0.1)
    node.fetch(sent(1))
    thread.join(10)
    assert len(node.replies()) == 1


def test_content_that_comes_late_is_waited_for(node: Node) -> None:
    message, gate = sent(1), threading.Event()
    contents = {name: thing.deflate() for name, thing in get_all_nested_objects(message).items()}

    def pull(name: str) -> bytes:
        gate.wait()
        return contents[name]

    fetching = threading.Thread(target=node.fetch, args=(message, pull))
    fetching.start()
    while not (token := node.acquire()):
        time.sleep(0.01)
    answering = threading.Thread(target=taken, args=(node, node.acquire, token))
    answering.start()
    time.sleep(0.1)
    assert not node.replies()
    gate.set()
    fetching.join(10)
    answering.join(10)
    assert len(node.replies()) == 1


def over(name: str) -> bytes:
    raise RunNotRunningException


def test_a_message_whose_run_ended_while_it_was_fetched_gives_way_to_the_next(node: Node) -> None:
    """The SuperNode says nothing of it: its task was waited for, and the site was gone for every later run."""
    node.fetch(sent(1), over)
    token = node.acquire()
    assert token
    following = sent(2)
    node.fetch(following)
    with pytest.raises(AbandonedError, match="its run ended before its content was there") as raised:
        taken(node, node.acquire, token)
    taken(node, token=raised.value.token)
    (reply,) = node.replies()
    assert reply.metadata.reply_to_message_id == following.metadata.message_id
    assert all(task.status.status == "finished" for task in node.state.get_tasks())


def test_a_message_that_could_not_be_fetched_is_given_up(node: Node) -> None:
    def lost(name: str) -> bytes:
        raise OSError("the connection broke")

    message = sent(1)
    tokens: list[str] = []

    def acquired_first(name: str) -> bytes:
        tokens.append(node.acquire())
        return lost(name)

    node.fetch(message, acquired_first)
    # Flower has finished the task; whoever holds its token is turned down.
    with pytest.raises(httpx.HTTPStatusError):
        taken(node, token=tokens[0])
    assert not node.replies()
    assert node.acquire() == ""


def test_a_reply_that_cannot_be_handed_over_leaves_the_task_for_the_supernode_to_notice(node: Node) -> None:
    class Broken(Connection):
        def PushMessages(self, request: object) -> None:
            raise httpx.ConnectError("gone")

    node.fetch(sent(1))
    with pytest.raises(httpx.ConnectError):
        answer("a", echo(), Broken(node, node.acquire()), nothing)
    (task,) = node.state.get_tasks()
    assert task.status.status == "running"
