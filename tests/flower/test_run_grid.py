"""A run on a stand-in SuperLink that is unreachable for a while, forgets the run, or has only parts of an answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity

from fedmllm.flower.carrier import ask, enclose, enclosed
from fedmllm.flower.run_grid import RunGrid
from fedmllm.flower.superlink import SuperLink, TurnedDownError
from fedmllm.types import ClientFailure

MANY = 1 << 30
REQUEST = httpx.Request("POST", "https://host:1/")


@pytest.fixture(autouse=True)
def identity() -> None:
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def status(code: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError(f"status {code}\nmore", request=REQUEST, response=httpx.Response(code, request=REQUEST))


class Link:
    """A SuperLink that echoes what it receives. While ``trouble`` is set, every call raises it."""

    def __init__(self) -> None:
        self.trouble: Exception | None = None
        self.withheld: set[str] = set()
        self.lost: set[str] = set()
        self.asked: list[str] = []
        self.forgotten: list[str] = []
        self._replies: dict[str, Message] = {}
        self._pieces: dict[str, bytes] = {}

    def _check(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    def push_messages(self, messages: list[Message]) -> list[str]:
        self._check()
        names = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = name = message.object_id
            reply = Message(message.content, reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            self._replies[name] = reply
            self._pieces |= {piece: thing.deflate() for piece, thing in get_all_nested_objects(reply).items()}
            names.append(name)
        return names

    def pieces(self, name: str) -> list[str]:
        return list(get_all_nested_objects(self._replies[name]))

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:
        self._check()
        replies = [self._replies.pop(name) for name in request.message_ids if name in self._replies]
        return PullAppMessagesResponse(
            messages_list=[message_to_proto(remove_content_from_message(reply)) for reply in replies],
            message_object_trees=[get_object_tree(reply) for reply in replies],
        )

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        self._check()
        name = request.object_id
        self.asked.append(name)
        there = name not in self.withheld
        return PullObjectResponse(
            object_found=name not in self.lost, object_available=there, object_content=self._pieces[name] if there else b""
        )

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> None:
        self._check()
        self.forgotten.append(request.message_object_id)

    def get_nodes(self) -> list[Any]:
        self._check()
        return []


class Grid(RunGrid):
    """A Grid whose runs start on the stand-in."""

    def __init__(self, link: Link) -> None:
        self.link, self.begun = link, 0
        super().__init__(SuperLink("host:1", Path(), Path(), {}, patience=30))

    def _open(self, patience: float | None = None) -> None:
        self.link._check()
        self.begun += 1
        self._heartbeat = SimpleNamespace(stop=lambda: None)
        self._grid = SimpleNamespace(
            push_messages=self.link.push_messages, get_nodes=self.link.get_nodes, _runtime_client=self.link, close=lambda: None
        )


def sent(grid: RunGrid, content: bytes = b"hello") -> str:
    (name,) = grid.push_messages([Message(enclose(content), dst_node_id=2, message_type="train")])
    return name


def test_an_answer_is_returned_when_complete_and_no_piece_is_fetched_twice() -> None:
    grid = Grid(link := Link())
    name = sent(grid, bytes(range(256)) * 60_000)
    pieces = link.pieces(name)
    assert len(pieces) > 4
    link.withheld = set(pieces)
    for _ in pieces:
        assert list(grid.pull_messages([name], MANY)) == []
        link.withheld.discard(link.asked[-1])
    (reply,) = grid.pull_messages([name], MANY)
    assert enclosed(reply.content) == bytes(range(256)) * 60_000
    assert reply.metadata.reply_to_message_id == name
    assert sorted(set(link.asked)) == sorted(pieces)
    # Each piece was requested once in vain and fetched once.
    assert len(link.asked) == 2 * len(pieces)


def test_answers_that_arrive_at_the_same_time_are_not_lost() -> None:
    """The SuperLink lists an answer once. Pieces of an answer are kept while another is looked for, until the answer is forgotten."""
    grid = Grid(link := Link())
    names = [sent(grid, bytes([i]) * 1000) for i in range(3)]
    link.withheld = {piece for name in names for piece in link.pieces(name)}
    for name in names * 2:
        assert list(grid.pull_messages([name], MANY)) == []
    grid.forget(names[2:])
    link.withheld.clear()
    found = [enclosed(reply.content) for name in names[:2] for reply in grid.pull_messages([name], MANY)]
    assert found == [bytes([i]) * 1000 for i in range(2)]
    assert list(grid.pull_messages(names[2:], MANY)) == []


def test_an_answer_with_a_lost_piece_is_given_up() -> None:
    grid = Grid(link := Link())
    name = sent(grid)
    link.lost = set(link.pieces(name)[:1])
    with pytest.raises(ValueError, match="a piece of the answer is lost"):
        grid.pull_messages([name], MANY)


def test_answers_are_deleted_when_all_have_been_fetched() -> None:
    """A deletion blocks Flower's database for sites that are still sending. After 5 s they give up."""
    grid = Grid(link := Link())
    names = [sent(grid, bytes([i])) for i in range(3)]
    replies = [link.pieces(name)[-1] for name in names]
    for name in names:
        assert len(list(grid.pull_messages([name], MANY))) == 1
    assert link.forgotten == []
    for _ in range(2):
        grid.online([])
        assert sorted(link.forgotten) == sorted(replies)


def test_an_answer_that_is_too_large_is_not_fetched_completely() -> None:
    grid = Grid(link := Link())
    name = sent(grid, os.urandom(50 << 20))
    pieces = link.pieces(name)
    with pytest.raises(ValueError, match="the answer has more than 11,"):
        grid.pull_messages([name], 10 << 20)
    assert len(link.asked) <= 3 < len(pieces)


@pytest.mark.parametrize("trouble", [httpx.ConnectError("refused"), httpx.ReadTimeout("slow"), status(502)])
def test_calls_fail_fast_while_the_superlink_is_unreachable_and_the_run_continues_afterwards(trouble: Exception) -> None:
    grid = Grid(link := Link())
    name = sent(grid)
    link.trouble, start = trouble, time.monotonic()
    for _ in range(3):
        with pytest.raises(ConnectionError, match="the SuperLink at host:1 cannot be reached"):
            grid.pull_messages([name], MANY)
    assert time.monotonic() - start < 5
    link.trouble = None
    assert len(list(grid.pull_messages([name], MANY))) == 1
    assert grid.begun == 1


def test_a_run_that_the_superlink_forgot_is_restarted_once_and_its_earlier_tasks_are_given_up() -> None:
    grid = Grid(link := Link())
    name = sent(grid)
    link.trouble = status(401)
    with pytest.raises(TurnedDownError, match=r"refused the call: status 401$"):
        grid.pull_messages([name], MANY)
    link.trouble = None
    for _ in range(3):
        with pytest.raises(ValueError, match="the task's run no longer exists on the SuperLink"):
            grid.pull_messages([name], MANY)
    assert grid.begun == 2
    assert len(list(grid.pull_messages([sent(grid)], MANY))) == 1
    assert grid.begun == 2


def contents(count: int) -> Iterator[tuple[str, bytes]]:
    return ((f"c{i}", bytes([i])) for i in range(count))


def asked(link: Link, grid: RunGrid, count: int, deadline: float, then: Callable[[str], None] = lambda name: None) -> dict[str, Any]:
    found = {}
    for name, content in ask(grid, "train", contents(count), {f"c{i}": 1 for i in range(count)}, deadline):
        found[name] = content
        then(name)
    return found


def test_all_clients_share_one_deadline_while_the_superlink_is_unreachable() -> None:
    """The deadline covers all clients; it does not start again for each one."""
    grid = Grid(link := Link())
    link.trouble, start = httpx.ConnectError("refused"), time.monotonic()
    found = asked(link, grid, 20, 0.5)
    assert 0.5 <= time.monotonic() - start < 5
    assert all(isinstance(content, ClientFailure) and "cannot be reached: refused" in content.reason for content in found.values())


def test_answers_survive_a_superlink_that_is_unreachable_for_a_while() -> None:
    grid = Grid(link := Link())
    working = grid.pull_messages
    start = time.monotonic()

    def pull(names: Any, largest: int) -> Any:
        link.trouble = httpx.ConnectError("refused") if time.monotonic() - start < 0.3 else None
        return working(names, largest)

    grid.pull_messages = pull  # type: ignore[method-assign]
    assert asked(link, grid, 3, 20) == {f"c{i}": bytes([i]) for i in range(3)}
    assert time.monotonic() - start >= 0.3


def test_the_failure_reason_names_an_unreachable_superlink() -> None:
    grid = Grid(link := Link())

    def gone(name: str) -> None:
        link.trouble = httpx.ConnectError("refused")

    found = asked(link, grid, 2, 0.4, gone)
    assert found["c0"] == b"\x00"
    assert found["c1"].reason == "no answer within the deadline of 0.4 s; the SuperLink at host:1 cannot be reached: refused"


def test_a_message_too_large_for_the_proxy_is_a_failure() -> None:
    class Small(Link):
        def push_messages(self, messages: list[Message]) -> list[str]:
            # Flower's result for a 413 response.
            return []

    found = asked(link := Small(), Grid(link), 1, 5)
    assert found["c0"] == ClientFailure("c0", "Flower did not accept the message", reached=False)
