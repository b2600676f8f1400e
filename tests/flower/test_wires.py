"""The connection from a run's server to its SuperLink breaks at each call; Flower's own interfaces and database, over TLS on loopback."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Message
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.main import create_app

from breaking import Fault, Proxy, served
from fedmllm.errors import FederationError
from fedmllm.flower import superlink, wire
from fedmllm.flower.carrier import ask
from fedmllm.flower.run_grid import RunGrid, serving
from fedmllm.flower.superlink import SuperLink
from fedmllm.sites import keys
from fedmllm.types import ClientFailure

# Raised by a library that Flower's database uses.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")

BROKEN: tuple[Fault, ...] = ("unread", "unanswered", "torn")
BEGIN = ("list-nodes", "register-node", "start-run", "acquire-task", "pull-task-input")
ROUND = ("get-nodes", "push-messages", "push-object", "pull-messages", "pull-object", "confirm-message-received", "push-task-output")
FAULTS: list[tuple[Fault, ...]] = [("unanswered",), ("unread", "torn")]
# The SuperLink hands out an answer once. If the connection breaks then, nobody knows whether it arrived.
RETRIED = [
    # Every other fault of a call runs with the slow tests.
    pytest.param(call, faults, marks=[] if (i + j) % 2 == 0 else pytest.mark.slow)
    for i, call in enumerate((*BEGIN, *ROUND))
    for j, faults in enumerate(FAULTS)
    if call != "pull-messages"
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PAUSES", (0.01,) * 4)
    # An unused claim expires after this many seconds, a task without a heartbeat after twice as many.
    monkeypatch.setattr(sql_corestate, "HEARTBEAT_DEFAULT_INTERVAL", 10)


class Server:
    """A SuperLink, and the site ``a``, which echoes what it receives."""

    def __init__(self, link: SuperLink, proxy: Proxy, state: Any) -> None:
        self.link, self.proxy, self._state = link, proxy, state
        self.asked = 0

    def connect(self) -> int:
        """Connect the site and return its node number."""
        key = superlink._public_key("a", self.link.keys["a"])
        node: int = self._state.get_node_id_by_public_key(key)
        self._state.activate_node(node, 1000)
        return node

    def end_runs(self) -> None:
        """End the runs, as the SuperLink does when a run's server sends no heartbeat."""
        for task in self._state.get_tasks(statuses=["running"]):
            assert self._state.finish_task(task.task_id, "failed", "no sign of life")

    def answer(self, node: int) -> None:
        """Answer one pending message, as the site's SuperNode and worker would."""
        for pending in self._state.get_message_ins(node, limit=1):
            self.asked += 1
            store, run, name = self._state.object_store, pending.metadata.run_id, pending.metadata.message_id
            pieces = {piece.object_id: store.get(piece.object_id) for piece in iterate_object_tree(store.get_object_tree(name))}
            message = inflate_object_from_contents(name, pieces)
            assert isinstance(message, Message)
            message.metadata.__dict__["_message_id"] = name
            store.delete(name)
            reply = Message(message.content, reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            session = self._state.start_session(run)
            stored, missing = self._state.store_message_and_object_tree(reply, get_object_tree(reply), session)
            assert stored
            contents = {key: thing.deflate() for key, thing in get_all_nested_objects(reply).items()}
            assert all(self._state.store_object(run, session, key, contents[key]) for key in missing)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "federation"
    keys.init(folder, "127.0.0.1:8000", ["a"])
    return folder / "server"


@pytest.fixture(scope="module")
def upstream(federation: Path) -> Iterator[tuple[int, Any]]:
    """The port and the state of a SuperLink."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLWR_DATABASE", str(federation / "state.db"))
        app = create_app()
    app.state.superexec_auth_secret = (federation / "secret").read_bytes()
    with served(app) as port:
        yield port, app.state.linkstate_factory.state()


@pytest.fixture
def server(federation: Path, upstream: tuple[int, Any]) -> Iterator[Server]:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(federation / "server.crt", federation / "server.key")
    # A new key for each test, which is not admitted yet.
    key = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    with Proxy(upstream[0], tls) as proxy:
        link = SuperLink(f"127.0.0.1:{proxy.port}", federation / "ca.crt", federation / "secret", {"a": key}, patience=20)
        yield Server(link, proxy, upstream[1])


def run(server: Server, content: bytes = bytes(1000)) -> bytes | ClientFailure:
    """The answer of one site in a run with one question, from the run's start to its end."""
    server.link.register()
    node = server.connect()
    with serving(server.link) as grid:
        assert grid.online(["a"]) == {"a": node}
        (found,) = asked(server, grid, node, content)
        # Fetched answers are deleted at the next look for sites.
        grid.online(["a"])
    return found


def asked(server: Server, grid: RunGrid, node: int, content: bytes, deadline: float = 20) -> list[bytes | ClientFailure]:
    pull = grid.pull_messages

    def polled(names: Any, largest: int) -> Any:
        server.answer(node)
        return pull(names, largest)

    grid.pull_messages = polled  # type: ignore[method-assign]
    return [answer for _, answer in ask(grid, "train", [("a", content)], {"a": node}, deadline, lambda name: 1 << 30)]


@pytest.mark.parametrize(("call", "faults"), RETRIED)
def test_a_run_survives_broken_connections(call: str, faults: tuple[Fault, ...], server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if call == "acquire-task":
        monkeypatch.setattr(sql_corestate, "HEARTBEAT_DEFAULT_INTERVAL", 2)
    server.proxy.fail(call, *faults)
    assert run(server) == bytes(1000)
    assert server.proxy.broken == [call] * len(faults)
    assert server.asked == 1


def test_a_request_that_the_superlink_did_not_read_is_repeated(server: Server) -> None:
    server.proxy.fail("pull-messages", "unread", "unread")
    assert run(server) == bytes(1000)


@pytest.mark.parametrize("fault", ["unanswered", "torn"])
def test_an_answer_lost_in_a_broken_connection_is_a_failure(fault: Fault, server: Server) -> None:
    server.proxy.fail("pull-messages", fault)
    start = time.monotonic()
    assert run(server) == ClientFailure("a", "the answer was lost because the connection to the SuperLink broke during delivery")
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("call", ["push-messages", "push-object"])
def test_a_site_is_asked_once_when_a_message_is_sent_repeatedly(call: str, server: Server) -> None:
    """Otherwise each retry sends another message, and the site, which waits up to 3 minutes for the rest of the first one, trains for each."""
    server.proxy.fail(call, *["unanswered"] * 7)
    assert run(server) == bytes(1000)
    # Pieces are sent concurrently; once one has failed, the remaining ones are not sent.
    assert set(server.proxy.broken) == {call}
    assert len(server.proxy.broken) >= 5
    assert server.asked == 1


def test_a_message_uses_the_new_run_after_the_superlink_ended_the_old_one(server: Server) -> None:
    server.link.register()
    node = server.connect()
    with serving(server.link) as grid:
        server.end_runs()
        start = time.monotonic()
        assert asked(server, grid, node, b"hello") == [b"hello"]
    assert time.monotonic() - start < 10
    assert server.asked == 1


def test_no_connection_is_used_twice(server: Server) -> None:
    """The proxy closes every connection that is used a second time."""
    assert run(server) == bytes(1000)
    assert server.proxy.broken == []


@pytest.mark.parametrize("call", [*BEGIN, "get-nodes"])
def test_a_silent_superlink_is_an_error_at_the_start(call: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "TIMEOUT", 0.2)
    monkeypatch.setattr(superlink, "_PATIENCE", 0.1)
    server.link = replace(server.link, patience=0.5)
    server.proxy.fail(call, *["silent"] * 100)
    start = time.monotonic()
    with pytest.raises((FederationError, ConnectionError), match=r"the SuperLink at 127\.0\.0\.1:.* cannot be reached: .*timed out"):
        run(server)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "call",
    [
        "push-messages",
        "pull-object",
        pytest.param("push-object", marks=pytest.mark.slow),
        pytest.param("pull-messages", marks=pytest.mark.slow),
    ],
)
def test_the_server_waits_for_a_silent_superlink_until_the_deadline(call: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.link.register()
    node = server.connect()
    with serving(server.link) as grid:
        monkeypatch.setattr(wire, "TIMEOUT", 0.2)
        grid._grid._client._patience = 0.1
        server.proxy.fail(call, *["silent"] * 100)
        start = time.monotonic()
        (found,) = asked(server, grid, node, b"hello", 1.0)
        # The rest of a call, and one more after the deadline.
        assert 1.0 <= time.monotonic() - start < 10
        assert isinstance(found, ClientFailure)
        assert "cannot be reached: " in found.reason


def test_a_silent_superlink_does_not_delay_the_end_of_a_run(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(server.link) as grid:
        monkeypatch.setattr(wire, "TIMEOUT", 0.2)
        grid._grid._client._patience = 0.1
        server.proxy.fail("push-task-output", *["silent"] * 100)
        start = time.monotonic()
    assert time.monotonic() - start < 10
