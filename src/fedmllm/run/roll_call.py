"""Which sites of a federation are there before its first round, and what they say of themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.observer import START, Observer
from fedmllm.errors import FederationError, listing
from fedmllm.flower.carrier import Carrier, ask
from fedmllm.flower.facts import Presence, read_word
from fedmllm.flower.messages import write_question
from fedmllm.types import ClientFailure

_POLL = 1.0
"""Seconds between two looks for sites that are not there yet."""


class Sites(Carrier, Protocol):
    """What leads to sites."""

    def online(self, names: Sequence[str]) -> dict[str, int]:
        """Those that are connected, and where.

        Raises:
            ConnectionError: if what leads to them is gone.
        """
        ...


@dataclass(frozen=True)
class RollCall:
    """Asks every site for its word, as they connect.

    Attributes:
        names: of the sites.
        grid: leads to them.
        settings: of the experiment, as sites are told them; they load model and data before they answer.
        policy: how long they are waited for.
        needed: without how many the first round would not be complete.
        observer: told whom the run waits for, and whom it begins without.
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
        """All sites, waited for until the deadline; then those that are there, if they are enough. If they are not, ``failures.below`` may have
        further deadlines waited for.

        Raises:
            FederationError: if too few are there; or if one says what is wrong with it, which is waited for only if ``below`` is to wait.
        """
        for _ in range(self.policy.attempts if self.policy.below == "wait" else 1):
            self._until(time.monotonic() + (self.policy.deadline or 0.0))
            if len(self.found) >= self.needed:
                if self._missing:
                    self.observer.waiting({"stage": START, "clients": self._missing, "given_up": True})
                return {name: self.found[name] for name in self.names if name in self.found}
        reasons = listing(f"{name}: {self.problems[name]}" for name in self._missing)
        raise FederationError(f"{len(self.found)} sites are there, {self.needed} are needed:\n{reasons}\nstart them with fedmllm site up")

    def _until(self, end: float) -> None:
        """Ask those that are connected, until all have answered or the time is over."""
        told: list[str] = []
        self._ask(end)
        while self._missing and time.monotonic() < end:
            if self._missing != told:
                told = self._missing
                self.observer.waiting({"stage": START, "clients": told, "given_up": False})
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
        told = content if isinstance(content, ClientFailure) else read_word(content, name, Presence)
        if isinstance(told, Presence):
            self.found[name] = told
            return
        self.problems[name] = told.reason
        if self.policy.below != "wait" and not isinstance(content, ClientFailure):
            raise FederationError(f"site {name} cannot take part: {told.reason}")
