"""Clients run here, one after another, on one resident base model whose adapters are swapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import Algorithm, Client
from fedmllm.data.modalities import profile
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import write_base
from fedmllm.training.batches import Encoder
from fedmllm.training.calibration import calibrated
from fedmllm.training.local import LocalRule, LocalTask, TrainingConfig, train_locally
from fedmllm.types import Broadcast, ClientUpdate, Sample


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
    """

    broadcast: Broadcast
    algorithm: Algorithm
    learning_rate: float
    seed: int
    states: ClientStates
    ranks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class InProcessEngine:
    """Trains the clients of a cohort one by one.

    Attributes:
        vlm: the one model, adapters attached.
        encoder: turns samples into tensors and keeps them.
        training: how each client trains.
    """

    vlm: VisionLanguageModel
    encoder: Encoder
    training: TrainingConfig

    def map_clients(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[ClientUpdate]:
        """Updates in the order of the clients, each made when it is asked for."""
        write_base(self.vlm, assignment.broadcast.base)
        for client, samples in clients.items():
            yield self._turn(assignment, client, samples)

    def _turn(self, assignment: Assignment, name: str, samples: Sequence[Sample]) -> ClientUpdate:
        """A client's turn: train, keep what is its own, send the rest at its own rank."""
        broadcast, algorithm = assignment.broadcast, assignment.algorithm
        client = Client(name, assignment.states.load(name, broadcast.round_num), profile(samples))
        rule, rank = algorithm.local_rule(broadcast, client), assignment.ranks.get(name)
        task = self._task(assignment, name, samples, rule)
        result = train_locally(self.vlm, task, rule, self.training)
        upload = rule.finish(result)
        keeps = dict(upload.keeps)
        if rule.personal is not None:
            # What a strategy adds is for the federation's sake: the client's own model trains on its samples as they are.
            alone = self._task(assignment, name, samples, rule.personal)
            keeps["personal"] = train_locally(self.vlm, alone, rule.personal, self.training).weights
        if keeps:
            assignment.states.save(name, broadcast.round_num, keeps)
        sent = {tensor: value for tensor, value in upload.weights.items() if algorithm.uploads(broadcast.round_num, tensor)}
        update = factors.cut(W.subtract(sent, task.received), rank)
        extras = {kind: factors.cut(tensors, rank) for kind, tensors in upload.extras.items()}
        return ClientUpdate(name, update, len(samples), result.metrics, extras, client.profile, rank)

    def _task(self, assignment: Assignment, name: str, samples: Sequence[Sample], rule: LocalRule) -> LocalTask:
        """What a client works on. Ranks beyond its own are zeros, in A and in B, which no gradient ever moves."""
        weights, rank = assignment.broadcast.weights, assignment.ranks.get(name)
        received = weights if rank is None else factors.padded(factors.cut(weights, rank), weights)
        encode = self.encoder.with_reduced if rule.alignment else self.encoder
        encoded = [encode(sample) for sample in samples]
        if rule.calibration:
            encoded = calibrated(self.vlm, samples, encoded, rule.calibration)
        return LocalTask(name, assignment.broadcast.round_num, assignment.seed, encoded, received, assignment.learning_rate)
