"""Sites before the first round: which ones the server waits for, and for how long. The sites answer in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.observer import Observer
from fedmllm.errors import FederationError
from fedmllm.flower.carrier import enclose, enclosed
from fedmllm.flower.facts import Presence, write_message
from fedmllm.flower.messages import read_task
from fedmllm.run import roll_call
from fedmllm.run.roll_call import RollCall
from fedmllm.types import ClientFailure, Record
from loopback import LoopbackGrid, Tamper

NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roll_call, "_POLL", 0.05)


class Sites(LoopbackGrid):
    """Sites that connect after given delays; those in ``wrong`` report an error."""

    def __init__(self, since: Mapping[str, float], wrong: Sequence[str] = (), tamper: Tamper = lambda reply: reply) -> None:
        app = ClientApp()

        @app.query()
        def query(message: Message, context: Context) -> Message:
            client = read_task(enclosed(message.content)).facts.client
            if client in wrong:
                return Message(enclose(write_message(ClientFailure(client, "no data"))), reply_to=message)
            answered = Presence(client=client, num_samples=5, profile={}, rank=None, trial=False)
            return Message(enclose(write_message(answered)), reply_to=message)

        super().__init__(app, tamper)
        self._since, self._begun = since, time.monotonic()

    def online(self, names: Sequence[str]) -> dict[str, int]:
        now = time.monotonic() - self._begun
        return {name: NAMES.index(name) + 1 for name in names if self._since.get(name, now + 1) <= now}


def roll_call_of(grid: Sites, needed: int = 3, **policy: Any) -> tuple[Callable[[], dict[str, Presence]], list[Record]]:
    said: list[Record] = []
    return RollCall(NAMES, grid, "seed: 0", FailureConfig(**policy), needed, Observer(waiting=said.append)).present, said


def test_connected_sites_are_asked_once_without_waiting() -> None:
    grid = Sites(dict.fromkeys(NAMES, 0))
    present, said = roll_call_of(grid, deadline=5)
    assert list(present()) == list(NAMES)
    assert said == []
    assert len(grid.sent) == 3


def test_outstanding_sites_are_reported() -> None:
    answered: list[Record] = []
    grid, policy = Sites({"a": 0, "c": 0}), FailureConfig(deadline=0.1)
    RollCall(NAMES, grid, "seed: 0", policy, 2, Observer(answered=answered.append)).present()
    assert [record["clients"] for record in answered][:3] == [["a", "c"], ["c"], []]


def test_the_server_waits_for_a_late_site_and_names_it() -> None:
    present, said = roll_call_of(Sites({"a": 0, "b": 0, "c": 0.4}), needed=1, deadline=20)
    assert list(present()) == list(NAMES)
    assert said == [{"stage": "start", "clients": ["c"], "given_up": False}]


def test_a_run_starts_without_a_missing_site_that_no_round_needs() -> None:
    start = time.monotonic()
    present, said = roll_call_of(Sites({"a": 0, "c": 0}), needed=2, deadline=0.5)
    assert list(present()) == ["a", "c"]
    assert 0.5 <= time.monotonic() - start < 5
    assert said[-1] == {"stage": "start", "clients": ["b"], "given_up": True}


def test_the_server_waits_for_silent_sites_until_the_deadline_only() -> None:
    start = time.monotonic()
    present, _ = roll_call_of(Sites(dict.fromkeys(NAMES, 0), tamper=lambda reply: None), deadline=0.4)
    with pytest.raises(FederationError, match=r"0 sites are ready, 3 are needed:\n  - a: no answer within the deadline of 0"):
        present()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("below", ["stop", "skip"])
def test_too_few_sites_are_an_error_that_names_the_missing_ones(below: str) -> None:
    present, _ = roll_call_of(Sites({"a": 0}), deadline=0.2, below=below)
    with pytest.raises(FederationError, match=r"1 sites are ready, 3 are needed:\n  - b: not connected\n  - c: not connected\nstart them"):
        present()


def test_the_wait_policy_lasts_a_limited_number_of_deadlines() -> None:
    late = {"a": 0, "b": 0, "c": 0.5}
    assert list(roll_call_of(Sites(late), deadline=0.2, below="wait", attempts=20)[0]()) == list(NAMES)
    with pytest.raises(FederationError, match="2 sites are ready"):
        roll_call_of(Sites({"a": 0, "b": 0}), deadline=0.2, below="wait", attempts=2)[0]()


def test_a_sites_error_is_raised_immediately() -> None:
    start = time.monotonic()
    with pytest.raises(FederationError, match="site b cannot participate: no data"):
        roll_call_of(Sites(dict.fromkeys(NAMES, 0), wrong=["b"]), needed=1, deadline=30)[0]()
    assert time.monotonic() - start < 10


def test_the_wait_policy_asks_a_site_with_an_error_again() -> None:
    grid = Sites(dict.fromkeys(NAMES, 0), wrong=["b"])
    present, said = roll_call_of(grid, needed=2, deadline=0.4, below="wait")
    assert list(present()) == ["a", "c"]
    assert len(grid.sent) > 4
    assert said[-1]["clients"] == ["b"]
