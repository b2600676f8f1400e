"""The connection from a worker to its SuperNode breaks at each call; Flower's own interface and state, over real connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from flwr.app import Message
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app

from breaking import Fault, Proxy, served
from fedmllm.errors import RunError
from fedmllm.flower import wire
from fedmllm.flower.settings import SiteConfig
from fedmllm.sites import incoming, supernode
from fedmllm.sites.supernode import Inbox
from nodes import Node, echo, sent

SECRET = b"secret" * 6
CALLS = ("acquire-task", "pull-task-input", "pull-messages", "pull-object", "confirm-message-received")
REPLIES = ("push-messages", "push-object", "push-task-output")
BROKEN: tuple[Fault, ...] = ("unread", "unanswered", "torn")
NOT_RETRIED = [("pull-messages", "unanswered"), ("pull-messages", "torn")]
RETRIED = [case for case in product([*CALLS, *REPLIES], BROKEN) if case not in NOT_RETRIED]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    monkeypatch.setattr(incoming, "POLL", 0.01)
    monkeypatch.setattr(incoming, "_LOST", 0.3)
    monkeypatch.setattr(wire, "PAUSES", (0.01,) * 4)


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def proxy(node: Node) -> Iterator[Proxy]:
    with served(create_app(node.factory, SECRET)) as port, Proxy(port) as proxy:
        yield proxy


@pytest.fixture
def site(proxy: Proxy, tmp_path: Path) -> SiteConfig:
    (tmp_path / "secret").write_bytes(SECRET)
    return SiteConfig.model_validate({"name": "a", "server": "host:1", "port": proxy.port, "folder": tmp_path})


def connection(site: SiteConfig) -> Any:
    shown = SuperExecAuthHttpInterceptor(master_secret=SECRET, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}))
    return supernode._connected(site, "SuperExec", shown)


def inbox(site: SiteConfig) -> Inbox:
    return Inbox(site, connection(site))


def work(site: SiteConfig, app: Any = None) -> None:
    """Handle the next message as ``serve`` does."""
    waiting, token = inbox(site), ""
    while not token:
        token = waiting.next()
    while token:
        token = supernode._answered(site, app or echo(), token, waiting.next)


def replied(node: Node, seconds: float = 20) -> Message:
    """The SuperNode's reply. The SuperNode looks for replies until there is one, and fails tasks that send no heartbeat."""
    until = time.monotonic() + seconds
    while not (found := node.replies()):
        assert time.monotonic() < until, "no reply"
        time.sleep(0.02)
    (reply,) = found
    return reply


def answered(node: Node, site: SiteConfig) -> Message:
    message = sent(1, "how are you?")
    node.fetch(message)
    thread = threading.Thread(target=work, args=(site,))
    thread.start()
    reply = replied(node)
    thread.join(20)
    assert not thread.is_alive()
    assert reply.metadata.reply_to_message_id == message.metadata.message_id
    return reply


def is_complete(node: Node, reply: Message) -> bool:
    """Whether the SuperNode has every piece of a reply that is not an error."""
    pieces = iterate_object_tree(node.store.get_object_tree(reply.metadata.message_id))
    return not reply.has_error() and all(node.store.get(piece.object_id) for piece in pieces)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unused claim expires after 2 s instead of 30, a task without a heartbeat after 4."""
    monkeypatch.setattr(in_memory_corestate, "HEARTBEAT_DEFAULT_INTERVAL", 2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("call", "fault"), RETRIED)
def test_a_message_is_answered_once_when_a_connection_breaks(call: str, fault: Fault, node: Node, proxy: Proxy, site: SiteConfig) -> None:
    proxy.fail(call, fault)
    reply = answered(node, site)
    assert proxy.broken == [call]
    assert is_complete(node, reply)
    assert [task.status.sub_status for task in node.state.get_tasks()] == ["completed"]
    assert not node.replies()


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("call", REPLIES)
def test_a_reply_is_delivered_when_connections_break_repeatedly(
    call: str, fault: Fault, node: Node, proxy: Proxy, site: SiteConfig
) -> None:
    proxy.fail(call, *[fault] * 4)
    assert is_complete(node, answered(node, site))
    assert proxy.broken == [call] * 4


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("call", "fault"), NOT_RETRIED)
def test_a_message_lost_in_a_broken_connection_is_answered_with_an_error(
    call: str, fault: Fault, node: Node, proxy: Proxy, site: SiteConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """Without this, the worker waits for the message forever and keeps sending heartbeats, so the SuperNode waits too."""
    proxy.fail(call, fault)
    reply = answered(node, site)
    assert reply.has_error()
    assert "lost a message (the connection broke during delivery)" in caplog.text


def test_no_connection_is_used_twice(node: Node, proxy: Proxy, site: SiteConfig) -> None:
    """The SuperNode closes connections that were idle for 5 s, which lost replies after longer training. The proxy closes reused connections."""
    for _ in range(2):
        assert is_complete(node, answered(node, site))
        node.state.delete_messages()
    assert proxy.seen.count("push-messages") == 2


@pytest.mark.parametrize("call", REPLIES)
def test_a_reply_that_cannot_be_delivered_ends_the_worker_and_the_supernode(call: str, node: Node, proxy: Proxy, site: SiteConfig) -> None:
    """Otherwise the SuperNode waits forever for the rest of the reply and takes no other message."""
    proxy.fail(call, *["unread"] * 100)
    node.fetch(sent(1))
    with pytest.raises(RunError, match=r"cannot hand over a reply to the SuperNode .*; this worker and the SuperNode restart"):
        work(site)
    assert proxy.broken == [call] * 5 or call == "push-object"


def test_a_lost_heartbeat_is_repeated(node: Node, proxy: Proxy, site: SiteConfig) -> None:
    proxy.fail("send-task-heartbeat", *BROKEN)
    assert is_complete(node, answered(node, site))


def test_a_heartbeat_of_an_ended_task_does_not_interrupt_the_process(node: Node, site: SiteConfig) -> None:
    """Flower's own heartbeat raises SIGINT if the task ends between its lookup and the acknowledgment."""
    node.state.acknowledge_task_heartbeat = lambda task: False  # type: ignore[method-assign]
    assert is_complete(node, answered(node, site))


def test_a_silent_supernode_during_delivery_ends_the_worker(
    node: Node, proxy: Proxy, site: SiteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "TIMEOUT", 0.3)
    monkeypatch.setattr(supernode, "_PATIENCE", 0.5)
    proxy.fail("push-messages", *["silent"] * 5)
    node.fetch(sent(1))
    start = time.monotonic()
    with pytest.raises(RunError, match=r"cannot hand over a reply to the SuperNode \(timed out\)"):
        work(site)
    assert time.monotonic() - start < 10


def test_the_worker_waits_for_a_silent_supernode_for_a_limited_time(
    proxy: Proxy, site: SiteConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(wire, "TIMEOUT", 0.1)
    monkeypatch.setattr(supernode, "_PATIENCE", 0.0)
    monkeypatch.setattr(supernode, "_GONE", 0.5)
    proxy.fail("acquire-task", *["silent"] * 1000)
    with pytest.raises(
        RunError, match=rf"no SuperNode responds on port {site.port} of this machine \(timed out\) for 0\.5 s; this worker and"
    ):
        work(site)
    assert caplog.text.count("waiting for it, for at most 0.5 s") == 1


def test_the_worker_waits_for_a_late_supernode_and_logs_it(node: Node, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fedmllm.site")
    with served(create_app(node.factory, SECRET)) as upstream:
        with Proxy(upstream) as proxy:
            port = proxy.port
        (tmp_path / "secret").write_bytes(SECRET)
        late = SiteConfig.model_validate({"name": "a", "server": "host:1", "port": port, "folder": tmp_path})
        waiting = inbox(late)
        assert waiting.next() == ""
        assert "a: no SuperNode responds on port" in caplog.text
        waiting._node = connection(late.model_copy(update={"port": upstream}))
        node.fetch(sent(1))
        assert waiting.next()
        assert "a: the SuperNode responds" in caplog.text


def test_content_that_never_arrives_ends_the_worker(
    node: Node, site: SiteConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedmllm.site")
    monkeypatch.setattr(incoming, "_CONTENT", 0.6)
    monkeypatch.setattr(incoming, "_LOST", 0.1)
    over = threading.Event()

    def pull(name: str) -> bytes:
        over.wait(20)
        raise OSError

    fetching = threading.Thread(target=node.fetch, args=(sent(1), pull))
    fetching.start()
    try:
        with pytest.raises(RunError, match=r"the content of a message did not arrive within 0\.6 s"):
            work(site)
    finally:
        over.set()
        fetching.join(20)
    assert "Waiting for the content of a message, for at most 0.6 s" in caplog.text


def test_a_refused_call_is_not_repeated(node: Node, proxy: Proxy, site: SiteConfig) -> None:
    own = supernode._connected(site, "flwr-clientapp", RuntimeTokenHttpInterceptor("no token"))
    with pytest.raises(httpx.HTTPStatusError):
        own.PullTaskInput(PullTaskInputRequest())
    own.close()
    assert proxy.seen == ["pull-task-input"]
