"""The in-process engine: clients train on one resident base model, in parallel through stacked adapters or one after another."""

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
from fedmllm.engine.base import Assignment, SecureStage, Split, scores_here
from fedmllm.engine.parties import Parties
from fedmllm.errors import ConfigError, FederationError, FedMLLMError
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import write_base
from fedmllm.models.memory import TokenBudget, clients_at_once, out_of_memory, release
from fedmllm.privacy.secagg.messages import Message
from fedmllm.training.batches import Encoder
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_in_parallel, train_locally
from fedmllm.training.per_sample import separable
from fedmllm.training.private import PrivateSteps
from fedmllm.training.rules import LocalResult, LocalRule, Upload
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import PERSONAL, Answer, ClientFailure, ClientUpdate, Metrics, Sample, Slots

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Job:
    """One client's training in a round."""

    client: Client
    samples: Sequence[Sample]
    rule: LocalRule
    rank: int | None


@dataclass(frozen=True)
class _Problem:
    """Why training failed, as text. The exception itself would keep the tensors of the failed pass alive.

    Attributes:
        reason: the text for the round's record.
        where: the traceback.
        memory: whether a memory allocation failed.
    """

    reason: str
    where: str
    memory: bool


@dataclass
class _Work:
    """Clients that were submitted with one assignment and have not started training.

    Attributes:
        assignment: the task.
        clients: training samples by client.
        begun: time of submission on the monotonic clock, in seconds.
    """

    assignment: Assignment
    clients: dict[str, Sequence[Sample]]
    begun: float = field(default_factory=time.monotonic)

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        deadline = self.assignment.deadline
        return deadline is not None and time.monotonic() - self.begun > deadline

    def wave(self, wanted: Sequence[str], size: int) -> dict[str, Sequence[Sample]]:
        """Remove and return the first clients that are wanted, up to ``size``."""
        return {name: self.clients.pop(name) for name in [name for name in wanted if name in self.clients][:size]}


@dataclass
class InProcessEngine:
    """Trains clients in this process when the caller takes their answers. Clients of a wave train in parallel.

    If a client's training raises an exception, its answer is a failure. Errors in settings or data (``FedMLLMError``) propagate.

    Attributes:
        vlm: the model, with adapters attached.
        encoder: turns samples into tensors and caches them.
        training: training settings of all clients.
        parallel_clients: maximum number of clients in a wave; 1 trains one after another. A GPU's free memory may allow fewer.
        private: how optimizer steps protect single samples; None if they do not. ``spend`` is called for every training: once for the update,
            once for a personalized model, and again for both if a failed wave is retried, because it is not known how far it came. A
            ``FedMLLMError`` from it propagates; any other exception makes the client's answer a failure.
        parties: the clients' side of secure aggregation; None if no task asks for it.
    """

    vlm: VisionLanguageModel
    encoder: Encoder
    training: TrainingConfig
    parallel_clients: int = 1
    private: PrivateSteps | None = None
    parties: Parties | None = None
    _pending: list[_Work] = field(default_factory=list, init=False)
    _running: Iterator[Answer] = field(default_factory=lambda: iter(()), init=False)
    _done: dict[str, Answer] = field(default_factory=dict, init=False)
    _outstanding: dict[str, None] = field(default_factory=dict, init=False)

    @property
    def remote(self) -> bool:
        """False: clients and their personalized models are in this process."""
        return False

    def submit(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> None:
        """Queue a task. Training starts when the caller takes an answer."""
        self._pending.append(_Work(assignment, dict(clients)))
        self._outstanding |= dict.fromkeys(clients)

    def completed(self, order: Sequence[str] | None = None) -> Iterator[Answer]:
        """Yield answers in the given order. The default is the order of submission."""
        names = list(self._outstanding) if order is None else list(order)
        for place, name in enumerate(names):
            yield self._answer(name, names[place:])

    def carry(self, stage: SecureStage) -> Iterator[tuple[str, Message | ClientFailure]]:
        """Let the clients of this process answer one after another."""
        for name, message in stage.messages.items():
            try:
                yield name, self._parties.answer(name, stage.name, message)
            except FederationError as error:
                yield name, ClientFailure(name, str(error))

    @property
    def _parties(self) -> Parties:
        if self.parties is None:
            raise ConfigError("a task asks for secure aggregation, but this engine has no keys for its clients")
        return self.parties

    def cancel(self) -> None:
        """Drop queued tasks and answers that the caller has not taken."""
        self._pending.clear()
        self._done.clear()
        self._outstanding.clear()
        self._running = iter(())

    def scores(self, assignment: Assignment, clients: Sequence[str], split: Split) -> dict[str, Metrics]:
        """Score the clients' personalized models one after another."""
        return scores_here(assignment, clients, split)

    def _answer(self, name: str, wanted: Sequence[str]) -> Answer:
        """Return a client's answer. If the client is not in the running wave, start its own, with those wanted after it.

        Raises:
            LookupError: if the client is not outstanding.
        """
        if name not in self._outstanding:
            raise LookupError(f"{name!r} is not outstanding")
        try:
            while name not in self._done:
                answer = next(self._running, None)
                if answer is None:
                    self._running = self._begun(name, wanted)
                else:
                    self._done[answer.client] = answer
        except BaseException:
            self.cancel()
            raise
        del self._outstanding[name]
        return self._done.pop(name)

    def _begun(self, name: str, wanted: Sequence[str]) -> Iterator[Answer]:
        """Start the wave of a client: the client and the next ones that are wanted and were submitted with it."""
        work = next(work for work in self._pending if name in work.clients)
        assignment, wave = work.assignment, work.wave(wanted, self._size)
        if not work.clients:
            self._pending.remove(work)
        if work.late:
            return iter([ClientFailure(client, f"did not start within the deadline of {assignment.deadline:g} s") for client in wave])
        write_base(self.vlm, assignment.broadcast.base)
        return self._wave(assignment, [self._job(assignment, client, samples) for client, samples in wave.items()])

    @property
    def _size(self) -> int:
        return min(self.parallel_clients, clients_at_once(self.vlm) or self.parallel_clients) if self._parallel else 1

    @cached_property
    def _parallel(self) -> bool:
        """Whether the model can train clients in parallel. Cached, because finding out needs a walk over all modules."""
        return separable(self.vlm)

    @cached_property
    def _budget(self) -> TokenBudget:
        """The token budget, shared by all waves."""
        return TokenBudget(self.training.max_batch_tokens)

    def _job(self, assignment: Assignment, name: str, samples: Sequence[Sample]) -> _Job:
        broadcast = assignment.broadcast
        client = Client(name, assignment.kept(name), profile(samples))
        return _Job(client, samples, assignment.algorithm.local_rule(broadcast, client), assignment.ranks.get(name))

    def _wave(self, assignment: Assignment, jobs: Sequence[_Job]) -> Iterator[Answer]:
        """Train clients and yield their answers.

        If a parallel wave fails, its clients are retried: half as many at once if memory ran out, otherwise one after another, so that one
        client's failure does not affect the others.
        """
        outcome = self._attempt(assignment, jobs)
        if not isinstance(outcome, _Problem):
            for job, result, personal in outcome:
                yield self._sent(assignment, job, result, personal)
            return
        release(self.vlm.device)
        if len(jobs) == 1:
            _LOG.warning("Client %s failed\n%s", jobs[0].client.name, outcome.where)
            yield ClientFailure(jobs[0].client.name, outcome.reason)
            return
        size = len(jobs) // 2 if outcome.memory else 1
        _LOG.warning("Training %d clients in parallel failed (%s); retrying with %d at a time", len(jobs), outcome.reason, size)
        for first in range(0, len(jobs), size):
            yield from self._wave(assignment, jobs[first : first + size])

    def _attempt(self, assignment: Assignment, jobs: Sequence[_Job]) -> list[tuple[_Job, LocalResult, Slots]] | _Problem:
        """Return each client's result, or the problem that stopped them all."""
        try:
            return self._trained(assignment, jobs)
        except FedMLLMError:
            raise
        except Exception as error:
            return _Problem(f"{type(error).__name__}: {error}", traceback.format_exc(), out_of_memory(error))

    def _trained(self, assignment: Assignment, jobs: Sequence[_Job]) -> list[tuple[_Job, LocalResult, Slots]]:
        """Return each client's result, with its personalized model if its rule trains one."""
        results = self._train(assignment, [(job, job.rule) for job in jobs])
        # A strategy's loss terms serve the global model. The personalized model trains on the client's samples without them.
        alone = [(job, job.rule.personal) for job in jobs if job.rule.personal is not None]
        weights = {job.client.name: result.weights for (job, _), result in zip(alone, self._train(assignment, alone), strict=True)}
        personal: list[Slots] = [{PERSONAL: weights[job.client.name]} if job.client.name in weights else {} for job in jobs]
        return list(zip(jobs, results, personal, strict=True))

    def _sent(self, assignment: Assignment, job: _Job, result: LocalResult, personal: Slots) -> Answer:
        """Save what the client keeps and return its update, or hold it back for secure aggregation."""
        upload, client = job.rule.finish(result), job.client
        ended = factors.cut(upload.weights, job.rank)
        context = ClientContext(client.name, assignment.algorithm, assignment.broadcast, assignment.seed, ended, client.state)
        update, kept = assignment.chain.client(_update(assignment, job, result, upload), context)
        # If this round gives the client nothing new to keep, save what it already had.
        if keeps := {**upload.keeps, **personal, **kept} or client.state:
            assignment.keep(client.name, keeps)
        return update if assignment.secure is None else self._parties.hold(assignment, update)

    def _train(self, assignment: Assignment, jobs: Sequence[tuple[_Job, LocalRule]]) -> list[LocalResult]:
        tasks = [(self._task(assignment, job, rule), rule) for job, rule in jobs]
        if len(tasks) > 1:
            return train_in_parallel(self.vlm, tasks, self.training, self._budget, self.private)
        return [train_locally(self.vlm, task, rule, self.training, self._budget, self.private) for task, rule in tasks]

    def _task(self, assignment: Assignment, job: _Job, rule: LocalRule) -> LocalTask:
        """Build a client's training task. Ranks beyond the client's own are zero in A and in B, so their gradients are zero."""
        weights, broadcast = assignment.broadcast.weights, assignment.broadcast
        received = weights if job.rank is None else factors.padded(factors.cut(weights, job.rank), weights)
        encoded = [self.encoder(sample) for sample in job.samples]
        for term in rule.all_terms:
            encoded = term.prepare(self.vlm, self.encoder, job.samples, encoded)
        return LocalTask(job.client.name, broadcast.round_num, assignment.seed, encoded, received, assignment.learning_rate, job.rank)


def _update(assignment: Assignment, job: _Job, result: LocalResult, upload: Upload) -> ClientUpdate:
    """Return a client's update at the client's own rank."""
    round_num = assignment.broadcast.round_num
    sent = {name: tensor for name, tensor in upload.weights.items() if assignment.algorithm.uploads(round_num, name)}
    update = factors.cut(W.subtract(sent, result.received), job.rank)
    extras = {kind: factors.cut(tensors, job.rank) for kind, tensors in upload.extras.items()}
    count, profile_ = len(job.samples), job.client.profile
    return ClientUpdate(job.client.name, update, count, result.metrics, extras, profile_, job.rank, round_num=round_num)
