"""Clients run here, on one resident base model: side by side through stacked adapters, or one after another."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import Algorithm, Client
from fedmllm.data.modalities import profile
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.engine.compression import UNCOMPRESSED, CompressionConfig, build_codec, sent_through
from fedmllm.errors import FedMLLMError
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import has_dropout, write_base
from fedmllm.models.memory import TokenBudget, clients_at_once, out_of_memory, release
from fedmllm.models.stacked import stackable
from fedmllm.training.batches import Encoder
from fedmllm.training.local import LocalTask, TrainingConfig, train_locally, train_together
from fedmllm.training.rules import LocalResult, LocalRule, Upload
from fedmllm.types import Accepted, Answer, Broadcast, ClientFailure, ClientUpdate, Sample, Slots, Weights

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """One round's work.

    Attributes:
        broadcast: what the cohort received.
        algorithm: the method, for its client rule.
        learning_rate: this round's.
        seed: the experiment's.
        states: what clients keep for themselves.
        ranks: clients' own LoRA ranks, where they differ from the server's.
        compression: how updates are written for the way up.
        deadline: seconds for the whole cohort; None for no limit.
        accepted: of the server's state: from which turn a client keeps what it does.
    """

    broadcast: Broadcast
    algorithm: Algorithm
    learning_rate: float
    seed: int
    states: ClientStates
    ranks: Mapping[str, int] = field(default_factory=dict)
    compression: CompressionConfig = UNCOMPRESSED
    deadline: float | None = None
    accepted: Accepted = field(default_factory=dict)

    def kept(self, client: str) -> Slots:
        """What a client kept from its last accepted turn."""
        return self.states.load(client, self.accepted.get(client, ()))

    def keep(self, client: str, slots: Slots) -> None:
        """What it keeps of this one, should its update be accepted."""
        self.states.save(client, self.broadcast.round_num, slots, self.accepted.get(client, ()))


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


@dataclass(frozen=True)
class InProcessEngine:
    """Trains the clients of a cohort here, side by side in waves.

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

    def map_clients(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[Answer]:
        """Answers in the order of the clients, those of a wave made when its first is asked for.

        A client whose training raises is a failure; what is wrong with settings or data (``FedMLLMError``) is raised.
        """
        write_base(self.vlm, assignment.broadcast.base)
        size = min(self.together, clients_at_once(self.vlm) or self.together) if self._side_by_side else 1
        begun, waiting = time.monotonic(), iter(clients.items())
        while wave := list(islice(waiting, size)):
            if assignment.deadline is not None and time.monotonic() - begun > assignment.deadline:
                yield from (ClientFailure(name, f"not begun within the deadline of {assignment.deadline:g} s") for name, _ in wave)
            else:
                yield from self._wave(assignment, [self._turn(assignment, name, samples) for name, samples in wave])

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
        upload = turn.rule.finish(result)
        ended = factors.cut(upload.weights, turn.rank) if assignment.algorithm.splits_anew else {}
        update, lost = _compressed(assignment.compression, _update(assignment, turn, result, upload), turn.client.state, ended)
        # A turn that leaves nothing new leaves what there was.
        if keeps := {**upload.keeps, **personal, **lost} or turn.client.state:
            assignment.keep(turn.client.name, keeps)
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


def _compressed(config: CompressionConfig, update: ClientUpdate, kept: Slots, ended: Weights) -> tuple[ClientUpdate, Slots]:
    """An update as it arrives, and what the client keeps of what was lost on the way.

    Args:
        config: how it is written.
        update: at the client's rank.
        kept: what the client has kept.
        ended: what it trained to, where the next round's factors have other directions; empty where they do not.
    """
    codec = build_codec(config)
    if codec is None:
        return update, {}
    # What is not finite has no directions; it is sent as it is, to be refused.
    if ended and W.is_finite(ended) and "ended" in kept:
        kept = {**kept, "lost_update": factors.carried(kept["lost_update"], kept["ended"], ended)}
    groups = {"update": update.update, **update.extras}
    sent = {kind: sent_through(codec, tensors, kept.get(f"lost_{kind}", {})) for kind, tensors in groups.items()}
    # What is not finite is refused; kept, it would spoil all of the client's later updates.
    left = {kind: through.lost for kind, through in sent.items() if config.error_feedback and W.is_finite(through.lost)}
    lost: Slots = {f"lost_{kind}": {**kept.get(f"lost_{kind}", {}), **tensors} for kind, tensors in left.items()}
    if ended and "lost_update" in lost:
        lost = {**lost, "ended": factors.named(dict(factors.pairs(ended)))}
    arrived = {kind: through.received for kind, through in sent.items()}
    packed = {kind: through.packed for kind, through in sent.items()}
    size = sum(through.num_bytes for through in sent.values())
    return replace(update, update=arrived.pop("update"), extras=arrived, num_bytes=size, packed=packed), lost
