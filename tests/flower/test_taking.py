"""Clients submitted to the Flower engine, and their answers taken in a given order or as they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedmllm.algorithms import ServerState
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.engine.base import Assignment
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.flower.carrier import enclose, enclosed
from fedmllm.flower.engine import FlowerEngine
from fedmllm.flower.frozen import BaseHistory
from fedmllm.flower.messages import read_task, write_answer
from fedmllm.types import ClientFailure, ClientUpdate

NODES = {name: number for number, name in enumerate("abcd")}


@dataclass
class Slow:
    """A carrier that has a client's answer after that many polls, or never for a client without an entry."""

    polls: dict[str, int]
    asked: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        names = [read_task(enclosed(message.content)).facts.client for message in messages]
        self.asked += names
        return names

    def pull_messages(self, message_ids: list[str], largest: int) -> Iterable[Any]:
        (name,) = message_ids
        self.polls[name] = self.polls.get(name, 10**9) - 1
        if self.polls[name] >= 0:
            return []
        update = ClientUpdate(name, {"w": torch.full((2,), float(NODES[name]))}, 1, {"steps": 1.0})
        return [Reply(write_answer(update, 0))]

    def forget(self, message_ids: Sequence[str]) -> None:
        self.forgotten += message_ids


@dataclass
class Reply:
    answer: bytes

    def has_error(self) -> bool:
        return False

    @property
    def content(self) -> Any:
        return enclose(self.answer)


@pytest.fixture(autouse=True)
def _of_a_run() -> None:
    # Flower sets these when it starts the process that receives a Grid.
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1


def submitted(polls: dict[str, int], tmp_path: Path, ahead: int | None = None, deadline: float | None = None) -> FlowerEngine:
    reached = lambda names: {name: NODES[name] for name in names if name != "d"}  # noqa: E731
    engine = FlowerEngine(Slow(polls), "federated", {}, reached, BaseHistory(tmp_path / "base"), ahead)
    broadcast = FedAvg().broadcast(ServerState({"w": torch.zeros(2)}))
    engine.submit(Assignment(broadcast, FedAvg(), 1e-3, 0, ClientStates(tmp_path), deadline=deadline), dict.fromkeys("abc", ()))
    return engine


def names(answers: Iterable[Any]) -> list[str]:
    found = list(answers)
    assert all(isinstance(answer, ClientUpdate) and float(answer.update["w"][0]) == NODES[answer.client] for answer in found)
    return [answer.client for answer in found]


@pytest.mark.parametrize("order", [["a", "b", "c"], ["c", "a", "b"]])
def test_answers_come_in_the_requested_order(order: Sequence[str], tmp_path: Path) -> None:
    assert names(submitted({"a": 5, "b": 0, "c": 2}, tmp_path).completed(order)) == order


def test_answers_come_as_they_arrive(tmp_path: Path) -> None:
    assert names(submitted({"a": 6, "b": 0, "c": 3}, tmp_path).completed()) == ["b", "c", "a"]


def test_clients_stay_outstanding_when_others_are_submitted(tmp_path: Path) -> None:
    engine = submitted({"a": 8, "b": 0, "c": 4}, tmp_path)
    assert next(engine.completed()).client == "b"
    broadcast = FedAvg().broadcast(ServerState({"w": torch.zeros(2)}))
    engine.submit(Assignment(broadcast, FedAvg(), 1e-3, 0, ClientStates(tmp_path)), {"b": ()})
    assert sorted(names(engine.completed())) == ["a", "b", "c"]
    assert list(engine.completed()) == []


def test_tasks_are_sent_as_answers_are_taken(tmp_path: Path) -> None:
    engine = submitted(dict.fromkeys("abc", 0), tmp_path, ahead=1)
    assert engine.grid.asked == ["a"]  # type: ignore[attr-defined]
    assert names([next(engine.completed(["c"]))]) == ["c"]
    assert engine.grid.asked == ["a", "c"]  # type: ignore[attr-defined]
    assert names(engine.completed()) == ["a", "b"]


def test_a_late_client_is_a_failure_in_either_order(tmp_path: Path) -> None:
    for order in (None, ["a", "b", "c"]):
        engine = submitted({"b": 0}, tmp_path, deadline=0.3)
        found = {answer.client: answer for answer in engine.completed(order)}
        assert sorted(engine.grid.forgotten) == ["a", "c"]  # type: ignore[attr-defined]
        assert isinstance(found["b"], ClientUpdate)
        late = [found["a"], found["c"]]
        assert all(isinstance(answer, ClientFailure) and "no answer within the deadline of 0.3 s" in answer.reason for answer in late)


def test_a_client_that_is_not_connected_was_not_reached(tmp_path: Path) -> None:
    engine = submitted(dict.fromkeys("abc", 0), tmp_path)
    broadcast = FedAvg().broadcast(ServerState({"w": torch.zeros(2)}))
    engine.submit(Assignment(broadcast, FedAvg(), 1e-3, 0, ClientStates(tmp_path)), {"d": ()})
    assert list(engine.completed(["d"])) == [ClientFailure("d", "not connected", reached=False)]


def test_only_outstanding_clients_can_be_requested(tmp_path: Path) -> None:
    engine = submitted(dict.fromkeys("abc", 0), tmp_path)
    with pytest.raises(LookupError, match="'d' is not outstanding"):
        next(engine.completed(["d"]))
    engine.cancel()
    assert engine.grid.forgotten == ["a", "b", "c"]  # type: ignore[attr-defined]
    assert list(engine.completed()) == []
    with pytest.raises(LookupError, match="'a' is not outstanding"):
        next(engine.completed(["a"]))
