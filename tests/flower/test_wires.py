"""The connection of a run's server to its SuperLink broken at the wrong moment of each call; Flower's own interfaces and database, over TLS on loopback."""

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

# Of a library that Flower's database uses.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning")

BROKEN: tuple[Fault, ...] = ("unread", "unanswered", "torn")
BEGIN = ("list-nodes", "register-node", "start-run", "acquire-task", "pull-task-input")
ROUND = ("get-nodes", "push-messages", "push-object", "pull-messages", "pull-object", "confirm-message-received", "push-task-output")
FAULTS: list[tuple[Fault, ...]] = [("unanswered",), ("unread", "torn")]
# An answer is given once. Whether it was, nobody knows where the connection broke then.
GIVEN_AGAIN = [(call, faults) for call in (*BEGIN, *ROUND) for faults in FAULTS if call != "pull-messages"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "PAUSES", (0.01,) * 4)
    # A claim that nobody uses lasts so many seconds, a task without a sign of life twice as many.
    monkeypatch.setattr(sql_corestate, "HEARTBEAT_DEFAULT_INTERVAL", 10)


class Server:
    """A SuperLink, and the site ``a``, which echoes what it is sent."""

    def __init__(self, link: SuperLink, proxy: Proxy, state: Any) -> None:
        self.link, self.proxy, self._state = link, proxy, state
        self.asked = 0

    def connect(self) -> int:
        """Have the site connected; its number."""
        key = superlink._public_key("a", self.link.keys["a"])
        node: int = self._state.get_node_id_by_public_key(key)
        self._state.activate_node(node, 1000)
        return node

    def end_runs(self) -> None:
        """As where a run's server gave no sign of life."""
        for task in self._state.get_tasks(statuses=["running"]):
            assert self._state.finish_task(task.task_id, "failed", "no sign of life")

    def answer(self, node: int) -> None:
        """What the site's SuperNode and worker do with a message, if there is one."""
        for told in self._state.get_message_ins(node, limit=1):
            self.asked += 1
            store, run, name = self._state.object_store, told.metadata.run_id, told.metadata.message_id
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
    # Another in each test, which is not admitted yet.
    key = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    with Proxy(upstream[0], tls) as proxy:
        link = SuperLink(f"127.0.0.1:{proxy.port}", federation / "ca.crt", federation / "secret", {"a": key}, patience=20)
        yield Server(link, proxy, upstream[1])


def run(server: Server, content: bytes = bytes(1000)) -> bytes | ClientFailure:
    """A run from its begin to its end, with one question to one site; what comes of it."""
    server.link.register()
    node = server.connect()
    with serving(server.link) as grid:
        assert grid.online(["a"]) == {"a": node}
        (found,) = asked(server, grid, node, content)
        # What has been taken is deleted when sites are looked for again.
        grid.online(["a"])
    return found


def asked(server: Server, grid: RunGrid, node: int, content: bytes, deadline: float = 20) -> list[bytes | ClientFailure]:
    pull = grid.pull_messages

    def looked(names: Any, largest: int) -> Any:
        server.answer(node)
        return pull(names, largest)

    grid.pull_messages = looked  # type: ignore[method-assign]
    return [answer for _, answer in ask(grid, "train", [("a", content)], {"a": node}, deadline, lambda name: 1 << 30)]


@pytest.mark.parametrize(("call", "faults"), GIVEN_AGAIN)
def test_a_run_ends_as_ever_although_connections_broke(
    call: str, faults: tuple[Fault, ...], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if call == "acquire-task":
        monkeypatch.setattr(sql_corestate, "HEARTBEAT_DEFAULT_INTERVAL", 2)
    server.proxy.fail(call, *faults)
    assert run(server) == bytes(1000)
    assert server.proxy.broken == [call] * len(faults)
    assert server.asked == 1


def test_a_question_to_the_superlink_that_was_not_read_is_asked_again(server: Server) -> None:
    server.proxy.fail("pull-messages", "unread", "unread")
    assert run(server) == bytes(1000)


@pytest.mark.parametrize("fault", ["unanswered", "torn"])
def test_an_answer_that_was_given_to_a_broken_connection_is_a_failure_that_says_so(fault: Fault, server: Server) -> None:
    server.proxy.fail("pull-messages", fault)
    start = time.monotonic()
    assert run(server) == ClientFailure("a", "the answer was lost because the connection to the SuperLink broke during delivery")
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("call", ["push-messages", "push-object"])
def test_a_site_is_asked_once_although_a_message_is_sent_until_the_superlink_answers(call: str, server: Server) -> None:
    """Each new try had sent another message, and the site, which waited for the rest of the first for 3 minutes, had trained for each."""
    server.proxy.fail(call, *["unanswered"] * 7)
    assert run(server) == bytes(1000)
    # Pieces are sent side by side, and those that are left not at all once one has failed.
    assert set(server.proxy.broken) == {call}
    assert len(server.proxy.broken) >= 5
    assert server.asked == 1


def test_a_message_goes_with_the_run_that_was_begun_for_one_that_the_superlink_has_ended(server: Server) -> None:
    server.link.register()
    node = server.connect()
    with serving(server.link) as grid:
        server.end_runs()
        start = time.monotonic()
        assert asked(server, grid, node, b"hello") == [b"hello"]
    assert time.monotonic() - start < 10
    assert server.asked == 1


def test_no_connection_is_used_that_the_superlink_may_have_closed(server: Server) -> None:
    """The proxy closes each that is used again."""
    assert run(server) == bytes(1000)
    assert server.proxy.broken == []


@pytest.mark.parametrize("call", [*BEGIN, "get-nodes"])
def test_a_superlink_that_is_silent_ends_the_begin_with_an_error(call: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "TIMEOUT", 0.2)
    monkeypatch.setattr(superlink, "_PATIENCE", 0.1)
    server.link = replace(server.link, patience=0.5)
    server.proxy.fail(call, *["silent"] * 100)
    start = time.monotonic()
    with pytest.raises((FederationError, ConnectionError), match=r"the SuperLink at 127\.0\.0\.1:.* cannot be reached: .*timed out"):
        run(server)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("call", ["push-messages", "push-object", "pull-messages", "pull-object"])
def test_a_superlink_that_is_silent_is_waited_for_until_the_deadline(call: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_superlink_that_is_silent_does_not_keep_a_run_from_ending(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(server.link) as grid:
        monkeypatch.setattr(wire, "TIMEOUT", 0.2)
        grid._grid._client._patience = 0.1
        server.proxy.fail("push-task-output", *["silent"] * 100)
        start = time.monotonic()
    assert time.monotonic() - start < 10
