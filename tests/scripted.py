"""An engine for tests in which subclasses script the clients' answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedmllm.algorithms import ServerState
from fedmllm.engine.base import Assignment, Engine, SecureStage, Split, scores_here
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.parties import Identity, Parties
from fedmllm.engine.secure import SecureAggregation
from fedmllm.errors import FederationError
from fedmllm.privacy.secagg.encoding import Encoding
from fedmllm.privacy.secagg.messages import STAGES, Message
from fedmllm.privacy.secagg.policy import Policy
from fedmllm.privacy.secagg.used import UsedRounds
from fedmllm.types import Answer, ClientFailure, ClientUpdate, Metrics, Sample
from secure_sessions import KEYS

Clients = Mapping[str, Sequence[Sample]]


@dataclass
class Scripted:
    """Subclasses define what clients answer, for all clients of a submission or for one client at a time.

    With ``parties``, clients hold their updates back for secure aggregation. Those in ``gone`` do not answer in that stage or later.
    """

    parties: Parties | None = field(default=None, init=False)
    gone: dict[str, Sequence[str]] = field(default_factory=dict, init=False)
    remote: bool = field(default=False, init=False)
    _works: list[tuple[Assignment, dict[str, Sequence[Sample]]]] = field(default_factory=list, init=False)

    def answers(self, assignment: Assignment, clients: Clients) -> Iterable[Answer]:
        raise NotImplementedError

    def submit(self, assignment: Assignment, clients: Clients) -> None:
        self._works.append((assignment, dict(clients)))

    def completed(self, order: Sequence[str] | None = None) -> Iterator[Answer]:
        for assignment, clients in self._works:
            asked = {name: clients.pop(name) for name in list(clients) if order is None or name in order}
            for answer in self.answers(assignment, asked) if asked else ():
                yield self.parties.hold(assignment, answer) if self.parties and isinstance(answer, ClientUpdate) else answer

    def carry(self, stage: SecureStage) -> Iterator[tuple[str, Message | ClientFailure]]:
        assert self.parties is not None
        left = {name for name in STAGES[: STAGES.index(stage.name) + 1] for name in self.gone.get(name, ())}
        for name, message in stage.messages.items():
            try:
                yield name, ClientFailure(name, "gone") if name in left else self.parties.answer(name, stage.name, message)
            except FederationError as error:
                yield name, ClientFailure(name, str(error))

    def cancel(self) -> None:
        self._works.clear()

    def scores(self, assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
        return scores_here(assignment, clients, split)


def answers(engine: Engine, assignment: Assignment, clients: Clients) -> Iterator[Answer]:
    """All answers of a submission, in its order."""
    engine.submit(assignment, clients)
    return engine.completed()


def secured(engine: Scripted, folder: Path, names: Sequence[str], encoding: Encoding, min_clients: int = 3) -> SecureAggregation:
    """Let the engine's clients hold their updates back, and return how the server sums them."""
    own = dict(zip(names, KEYS, strict=False))
    keys = {name: key.public_key() for name, key in own.items()}
    engine.parties = Parties(encoding, lambda name: Identity(own[name], UsedRounds(folder / f"{name}.jsonl"), Policy(2)), keys)
    return SecureAggregation("run", encoding, keys, min_clients, UsedRounds(folder / "masked.jsonl"))


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
