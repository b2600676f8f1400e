"""Messages taken from Flower's SuperNode: its real state, handlers and fetching, without processes or a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.servicer.runtime import runtime_handlers as own

from fedmllm.sites import incoming
from fedmllm.sites.incoming import AbandonedError
from fedmllm.sites.supernode import answer
from nodes import Node, echo, sent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "POLL", 0.01)


class Connection:
    """A task's connection: the interface that the holder of its token gets."""

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


@pytest.fixture
def node() -> Node:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    return Node()


def nothing() -> str:
    return ""


def answer_next(node: Node, another: Callable[[], str] = nothing, token: str = "") -> None:
    answer("a", echo(), Connection(node, token or node.acquire()), another)


def test_a_message_is_answered(node: Node) -> None:
    message = sent(1)
    node.fetch(message)
    answer_next(node)
    (reply,) = node.replies()
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    assert not reply.has_error()


def test_an_error_in_the_app_is_a_reply_with_the_errors_type_only(node: Node) -> None:
    node.fetch(sent(1, "fail"))
    answer_next(node)
    (reply,) = node.replies()
    assert reply.has_error()
    assert reply.error.reason == "OSError"


def test_the_worker_waits_for_a_message_that_arrives_after_its_task(node: Node) -> None:
    """The SuperNode creates the task first. A worker that looked in between and gave up left the SuperNode waiting forever."""
    node.state.create_task(task_type="flwr-clientapp", run_id=1, fab_hash=None)
    token = node.acquire()
    thread = threading.Thread(target=answer_next, args=(node, nothing, token))
    thread.start()
    time.sleep(0.1)
    node.fetch(sent(1))
    thread.join(10)
    assert len(node.replies()) == 1


def test_the_worker_waits_for_late_content(node: Node) -> None:
    message, gate = sent(1), threading.Event()
    contents = {name: thing.deflate() for name, thing in get_all_nested_objects(message).items()}

    def pull(name: str) -> bytes:
        gate.wait()
        return contents[name]

    fetching = threading.Thread(target=node.fetch, args=(message, pull))
    fetching.start()
    while not (token := node.acquire()):
        time.sleep(0.01)
    answering = threading.Thread(target=answer_next, args=(node, node.acquire, token))
    answering.start()
    time.sleep(0.1)
    assert not node.replies()
    gate.set()
    fetching.join(10)
    answering.join(10)
    assert len(node.replies()) == 1


def run_ended(name: str) -> bytes:
    raise RunNotRunningException


def test_a_message_whose_run_ended_during_the_fetch_is_abandoned_for_the_next(node: Node) -> None:
    """The SuperNode does not report this. The worker would wait for the old task and miss every later run."""
    node.fetch(sent(1), run_ended)
    token = node.acquire()
    assert token
    following = sent(2)
    node.fetch(following)
    with pytest.raises(AbandonedError, match="its run ended before its content arrived") as raised:
        answer_next(node, node.acquire, token)
    answer_next(node, token=raised.value.token)
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
    # Flower has finished the task and turns down its token.
    with pytest.raises(httpx.HTTPStatusError):
        answer_next(node, token=tokens[0])
    assert not node.replies()
    assert node.acquire() == ""


def test_a_reply_that_cannot_be_delivered_leaves_the_task_running(node: Node) -> None:
    class Broken(Connection):
        def PushMessages(self, request: object) -> None:
            raise httpx.ConnectError("gone")

    node.fetch(sent(1))
    with pytest.raises(httpx.ConnectError):
        answer("a", echo(), Broken(node, node.acquire()), nothing)
    (task,) = node.state.get_tasks()
    assert task.status.status == "running"
