"""Finds the sites that are connected and ready before the first round."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.observer import START, Observer
from fedmllm.errors import FederationError, listing
from fedmllm.flower.carrier import Carrier, ask
from fedmllm.flower.facts import Presence, read_message
from fedmllm.flower.messages import write_question
from fedmllm.types import ClientFailure

_POLL = 1.0
"""Seconds between two checks for missing sites."""


class Sites(Carrier, Protocol):
    """A carrier of messages to sites."""

    def online(self, names: Sequence[str]) -> dict[str, int]:
        """Return the node ids of the sites that are connected, by name.

        Raises:
            ConnectionError: if the connection to the sites is lost.
        """
        ...


@dataclass(frozen=True)
class RollCall:
    """Asks every site for its presence message as soon as it connects.

    Attributes:
        names: names of the sites.
        grid: carries messages to the sites.
        settings: the experiment as YAML for sites, which load model and data before they answer.
        policy: how long to wait for sites.
        needed: number of sites that the first round needs.
        observer: receives the sites that the run waits for, and those that it starts without.
    """

    names: Sequence[str]
    grid: Sites
    settings: str
    policy: FailureConfig
    needed: int
    observer: Observer
    found: dict[str, Presence] = field(default_factory=dict, init=False)
    problems: dict[str, str] = field(default_factory=dict, init=False)

    @property
    def _missing(self) -> list[str]:
        return [name for name in self.names if name not in self.found]

    def present(self) -> dict[str, Presence]:
        """Return the presence messages of all sites or, after the deadline, of those that have answered if they are enough.

        If they are too few and ``failures.below`` is ``wait``, the run waits for further deadlines, ``failures.attempts`` in total.

        Raises:
            FederationError: if too few sites answer, or if one reports a problem and ``failures.below`` is not ``wait``.
        """
        for _ in range(self.policy.attempts if self.policy.below == "wait" else 1):
            self._until(time.monotonic() + (self.policy.deadline or 0.0))
            if len(self.found) >= self.needed:
                if self._missing:
                    self.observer.waiting({"stage": START, "clients": self._missing, "given_up": True})
                return {name: self.found[name] for name in self.names if name in self.found}
        reasons = listing(f"{name}: {self.problems[name]}" for name in self._missing)
        raise FederationError(f"{len(self.found)} sites are ready, {self.needed} are needed:\n{reasons}\nstart them with fedmllm site up")

    def _until(self, end: float) -> None:
        """Ask connected sites until all have answered or the time is up."""
        reported: list[str] = []
        self._ask(end)
        while self._missing and time.monotonic() < end:
            if self._missing != reported:
                reported = self._missing
                self.observer.waiting({"stage": START, "clients": reported, "given_up": False})
            time.sleep(_POLL)
            self._ask(end)

    def _ask(self, end: float) -> None:
        names = self._missing
        try:
            nodes = self.grid.online(names)
        except ConnectionError as error:
            self.problems.update(dict.fromkeys(names, str(error)))
            return
        self.problems.update({name: "not connected" for name in names if name not in nodes})
        questions = [(name, write_question(name, {"experiment": self.settings})) for name in names if name in nodes]
        left = [name for name, _ in questions]
        self.observer.answered({"stage": START, "clients": list(left)})
        for name, content in ask(self.grid, "query", questions, nodes, max(0.0, end - time.monotonic())):
            left.remove(name)
            self.observer.answered({"stage": START, "clients": list(left)})
            self._note(name, content)

    def _note(self, name: str, content: bytes | ClientFailure) -> None:
        message = content if isinstance(content, ClientFailure) else read_message(content, name, Presence)
        if isinstance(message, Presence):
            self.found[name] = message
            return
        self.problems[name] = message.reason
        if self.policy.below != "wait" and not isinstance(content, ClientFailure):
            raise FederationError(f"site {name} cannot participate: {message.reason}")
