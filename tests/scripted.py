"""An engine for tests in which subclasses script the clients' answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from fedmllm.algorithms import ServerState
from fedmllm.engine.base import Assignment, Engine, Split, scores_here
from fedmllm.engine.checkpoint import RunStore
from fedmllm.types import Answer, Metrics, Sample

Clients = Mapping[str, Sequence[Sample]]


@dataclass
class Scripted:
    """Subclasses define what clients answer, for all clients of a submission or for one client at a time."""

    remote: bool = field(default=False, init=False)
    _works: list[tuple[Assignment, dict[str, Sequence[Sample]]]] = field(default_factory=list, init=False)

    def answers(self, assignment: Assignment, clients: Clients) -> Iterable[Answer]:
        raise NotImplementedError

    def submit(self, assignment: Assignment, clients: Clients) -> None:
        self._works.append((assignment, dict(clients)))

    def completed(self, order: Sequence[str] | None = None) -> Iterator[Answer]:
        for assignment, clients in self._works:
            asked = {name: clients.pop(name) for name in list(clients) if order is None or name in order}
            if asked:
                yield from self.answers(assignment, asked)

    def cancel(self) -> None:
        self._works.clear()

    def scores(self, assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
        return scores_here(assignment, clients, split)


def answers(engine: Engine, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
    """All answers of a submission, in its order."""
    engine.submit(assignment, clients)
    return engine.completed()


def unscored() -> Split:
    """A split on which every model has the same score."""
    return Split(lambda weights, base: {"score": 0.0})


@contextmanager
def cut_short(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """Interrupts the body's run before it writes the checkpoint of any round after this one."""
    save = RunStore.save_state

    def fail(store: RunStore, stage: str, state: ServerState) -> None:
        if state.round_num > after:
            raise KeyboardInterrupt
        save(store, stage, state)

    with monkeypatch.context() as patched:
        patched.setattr(RunStore, "save_state", fail)
        with pytest.raises(KeyboardInterrupt):
            yield
