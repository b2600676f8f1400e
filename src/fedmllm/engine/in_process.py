"""Clients run here, on one resident base model: side by side through stacked adapters, or one after another."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import Client, ClientContext
from fedmllm.data.modalities import profile
from fedmllm.engine.base import Assignment, Split, scores_here
from fedmllm.errors import FedMLLMError
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import has_dropout, write_base
from fedmllm.models.memory import TokenBudget, clients_at_once, out_of_memory, release
from fedmllm.models.parallel_adapters import stackable
from fedmllm.training.batches import Encoder
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_locally, train_together
from fedmllm.training.rules import LocalResult, LocalRule, Upload
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Answer, ClientFailure, ClientUpdate, Metrics, Sample, Slots

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Turn:
    """A client's part of a round."""

    client: Client
    samples: Sequence[Sample]
    rule: LocalRule
    rank: int | None


@dataclass(frozen=True)
class _Problem:
    """Why clients could not be trained. Words only: an error would keep the tensors of the pass alive in which it was raised.

    Attributes:
        reason: for the round's record.
        where: the traceback.
        memory: whether an allocation failed.
    """

    reason: str
    where: str
    memory: bool


@dataclass
class _Work:
    """Clients that were submitted with one assignment and have not begun.

    Attributes:
        assignment: what to do.
        clients: samples by client.
        begun: when they were submitted.
    """

    assignment: Assignment
    clients: dict[str, Sequence[Sample]]
    begun: float = field(default_factory=time.monotonic)

    @property
    def late(self) -> bool:
        """Whether its deadline is over."""
        deadline = self.assignment.deadline
        return deadline is not None and time.monotonic() - self.begun > deadline

    def wave(self, first: str, size: int) -> dict[str, Sequence[Sample]]:
        """Take out a client and those after it, as many as train side by side."""
        names = list(self.clients)
        place = names.index(first)
        return {name: self.clients.pop(name) for name in names[place : place + size]}


@dataclass
class InProcessEngine:
    """Trains clients here, side by side in waves, when their answers are asked for.

    A client whose training raises is a failure; what is wrong with settings or data (``FedMLLMError``) is raised.

    Attributes:
        vlm: the one model, adapters attached.
        encoder: turns samples into tensors and keeps them.
        training: how each client trains.
        together: clients of a wave at most; 1 for one after another. A GPU's free memory may allow fewer.
    """

    vlm: VisionLanguageModel
    encoder: Encoder
    training: TrainingConfig
    together: int = 1
    _waiting: list[_Work] = field(default_factory=list, init=False)
    _running: Iterator[Answer] = field(default_factory=lambda: iter(()), init=False)
    _done: dict[str, Answer] = field(default_factory=dict, init=False)

    @property
    def remote(self) -> bool:
        """No."""
        return False

    def submit(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> None:
        """Note what to do; nothing is trained yet."""
        self._waiting.append(_Work(assignment, dict(clients)))

    def completed(self, order: Sequence[str] | None = None) -> Iterator[Answer]:
        """Answers in the order asked for, or in that of submission."""
        for name in [*self._done, *(name for work in self._waiting for name in work.clients)] if order is None else order:
            yield self._answer(name)

    def cancel(self) -> None:
        """Forget what was not trained yet, and what was not asked for."""
        self._waiting.clear()
        self._done.clear()
        self._running = iter(())

    def scores(self, assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
        """One after another."""
        return scores_here(assignment, clients, split)

    def _answer(self, name: str) -> Answer:
        """A client's answer: that of the wave that runs, or of its own, which begins now."""
        try:
            while name not in self._done:
                answer = next(self._running, None)
                if answer is None:
                    self._running = self._begun(name)
                else:
                    self._done[answer.client] = answer
        except BaseException:
            self.cancel()
            raise
        return self._done.pop(name)

    def _begun(self, name: str) -> Iterator[Answer]:
        """The wave in which a client trains: it and those after it that were submitted with it.

        Raises:
            LookupError: if the client is not outstanding.
        """
        work = next((work for work in self._waiting if name in work.clients), None)
        if work is None:
            raise LookupError(f"{name!r} is not outstanding")
        assignment, wave = work.assignment, work.wave(name, self._size)
        if not work.clients:
            self._waiting.remove(work)
        if work.late:
            return iter([ClientFailure(client, f"not begun within the deadline of {assignment.deadline:g} s") for client in wave])
        write_base(self.vlm, assignment.broadcast.base)
        return self._wave(assignment, [self._turn(assignment, client, samples) for client, samples in wave.items()])

    @property
    def _size(self) -> int:
        return min(self.together, clients_at_once(self.vlm) or self.together) if self._side_by_side else 1

    @cached_property
    def _side_by_side(self) -> bool:
        """Whether the model lets clients train in the same passes; to find that out takes a walk over all its modules."""
        return stackable(self.vlm.model) and not has_dropout(self.vlm.model)

    @cached_property
    def _budget(self) -> TokenBudget:
        """Of all waves."""
        return TokenBudget(self.training.max_batch_tokens)

    def _turn(self, assignment: Assignment, name: str, samples: Sequence[Sample]) -> _Turn:
        broadcast = assignment.broadcast
        client = Client(name, assignment.kept(name), profile(samples))
        return _Turn(client, samples, assignment.algorithm.local_rule(broadcast, client), assignment.ranks.get(name))

    def _wave(self, assignment: Assignment, turns: Sequence[_Turn]) -> Iterator[Answer]:
        """Train and send. If side by side something breaks, one after another, so that no client takes others with it; fewer at once if it is
        the memory."""
        outcome = self._attempt(assignment, turns)
        if not isinstance(outcome, _Problem):
            for turn, result, personal in outcome:
                yield self._sent(assignment, turn, result, personal)
            return
        release(self.vlm.device)
        if len(turns) == 1:
            _LOG.warning("%s failed\n%s", turns[0].client.name, outcome.where)
            yield ClientFailure(turns[0].client.name, outcome.reason)
            return
        size = len(turns) // 2 if outcome.memory else 1
        _LOG.warning("%d clients side by side failed (%s); they train again, %d at once", len(turns), outcome.reason, size)
        for first in range(0, len(turns), size):
            yield from self._wave(assignment, turns[first : first + size])

    def _attempt(self, assignment: Assignment, turns: Sequence[_Turn]) -> list[tuple[_Turn, LocalResult, Slots]] | _Problem:
        """What each came to, or why nothing did."""
        try:
            return self._trained(assignment, turns)
        except FedMLLMError:
            raise
        except Exception as error:
            return _Problem(f"{type(error).__name__}: {error}", traceback.format_exc(), out_of_memory(error))

    def _trained(self, assignment: Assignment, turns: Sequence[_Turn]) -> list[tuple[_Turn, LocalResult, Slots]]:
        """What each came to, and the model of its own that it keeps, if its rule has one."""
        results = self._train(assignment, [(turn, turn.rule) for turn in turns])
        # What a strategy adds is for the federation's sake: the client's own model trains on its samples as they are.
        alone = [(turn, turn.rule.personal) for turn in turns if turn.rule.personal is not None]
        weights = {turn.client.name: result.weights for (turn, _), result in zip(alone, self._train(assignment, alone), strict=True)}
        personal: list[Slots] = [{"personal": weights[turn.client.name]} if turn.client.name in weights else {} for turn in turns]
        return list(zip(turns, results, personal, strict=True))

    def _sent(self, assignment: Assignment, turn: _Turn, result: LocalResult, personal: Slots) -> ClientUpdate:
        """Keep what is the client's own, send the rest."""
        upload, client = turn.rule.finish(result), turn.client
        ended = factors.cut(upload.weights, turn.rank)
        context = ClientContext(client.name, assignment.algorithm, assignment.broadcast, assignment.seed, ended, client.state)
        update, kept = assignment.chain.client(_update(assignment, turn, result, upload), context)
        # A turn that leaves nothing new leaves what there was.
        if keeps := {**upload.keeps, **personal, **kept} or client.state:
            assignment.keep(client.name, keeps)
        return update

    def _train(self, assignment: Assignment, turns: Sequence[tuple[_Turn, LocalRule]]) -> list[LocalResult]:
        tasks = [(self._task(assignment, turn, rule), rule) for turn, rule in turns]
        if len(tasks) > 1:
            return train_together(self.vlm, tasks, self.training, self._budget)
        return [train_locally(self.vlm, task, rule, self.training, self._budget) for task, rule in tasks]

    def _task(self, assignment: Assignment, turn: _Turn, rule: LocalRule) -> LocalTask:
        """What a client works on. Ranks beyond its own are zeros, in A and in B, which no gradient ever moves."""
        weights, broadcast = assignment.broadcast.weights, assignment.broadcast
        received = weights if turn.rank is None else factors.padded(factors.cut(weights, turn.rank), weights)
        encoded = [self.encoder(sample) for sample in turn.samples]
        for term in rule.all_terms:
            encoded = term.prepare(self.vlm, self.encoder, turn.samples, encoded)
        return LocalTask(turn.client.name, broadcast.round_num, assignment.seed, encoded, received, assignment.learning_rate)


def _update(assignment: Assignment, turn: _Turn, result: LocalResult, upload: Upload) -> ClientUpdate:
    """What a client sends, at its own rank."""
    round_num = assignment.broadcast.round_num
    sent = {name: tensor for name, tensor in upload.weights.items() if assignment.algorithm.uploads(round_num, name)}
    update = factors.cut(W.subtract(sent, result.received), turn.rank)
    extras = {kind: factors.cut(tensors, turn.rank) for kind, tensors in upload.extras.items()}
    count, profile_ = len(turn.samples), turn.client.profile
    return ClientUpdate(turn.client.name, update, count, result.metrics, extras, profile_, turn.rank, round_num=round_num)
