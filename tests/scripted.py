"""An engine of the tests' own, for those that say by themselves what clients answer."""

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
    """Subclasses say what clients answer; asked for once a submission, or for a single client where answers are taken one by one."""

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
    """A split that every model scores alike on."""
    return Split(lambda weights, base: {"score": 0.0})


@contextmanager
def cut_short(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """The body's run is interrupted before the checkpoint of any round after this one is written."""
    save = RunStore.save_state

    def fail(store: RunStore, stage: str, state: ServerState) -> None:
        if state.round_num > after:
            raise KeyboardInterrupt
        save(store, stage, state)

    with monkeypatch.context() as patched:
        patched.setattr(RunStore, "save_state", fail)
        with pytest.raises(KeyboardInterrupt):
            yield
