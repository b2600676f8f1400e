"""Clients run here, one after another, on one resident base model whose adapters are swapped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedmllm import weights as W
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder
from fedmllm.training.local import LocalRule, LocalTask, TrainingConfig, train_locally
from fedmllm.types import Broadcast, ClientUpdate, Sample


@dataclass(frozen=True)
class Assignment:
    """One round's work: what the cohort received, the rule it follows, the round's learning rate."""

    broadcast: Broadcast
    rule: LocalRule
    learning_rate: float
    seed: int


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
        for client, samples in clients.items():
            yield self._train(assignment, client, samples)

    def _train(self, assignment: Assignment, client: str, samples: Sequence[Sample]) -> ClientUpdate:
        start = assignment.broadcast.weights
        task = LocalTask(
            client,
            assignment.broadcast.round_num,
            assignment.seed,
            [self.encoder(sample) for sample in samples],
            start,
            assignment.learning_rate,
        )
        result = train_locally(self.vlm, task, assignment.rule, self.training)
        return ClientUpdate(client, W.subtract(result.weights, start), len(samples), result.metrics)
