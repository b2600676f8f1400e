"""What every loop trains: the embedded model, some clients with equal numbers of samples, one epoch of AdamW at a constant rate."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from fedmllm.config import Experiment
from fedmllm.data.federated import federate
from fedmllm.models.encoding import Encoded, collate
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import attach_lora, read_weights
from fedmllm.training.batches import Encoder
from fedmllm.types import Sample, Weights

SAMPLES = 24
"""Of each client."""


@dataclass(frozen=True)
class Workload:
    """A cohort's round.

    Attributes:
        experiment: model, data and training.
        clients: equally many samples each.
        vlm: the model with adapters.
        start: what the clients receive.
        encoder: samples to tensors, kept.
    """

    experiment: Experiment
    clients: dict[str, list[Sample]]
    vlm: VisionLanguageModel
    start: Weights
    encoder: Encoder

    @property
    def num_samples(self) -> int:
        """Trained in a round."""
        return sum(map(len, self.clients.values()))


def workload(cohort: int, batch_size: int, accumulation: int) -> Workload:
    """Build it; everything is encoded once, so that no loop is charged for pictures."""
    experiment = Experiment.parse(
        {
            "data": {"num_train": 1600, "num_test": 100},
            "federation": {"num_clients": 10, "clients_per_round": cohort, "partition": "iid"},
            "training": {"batch_size": batch_size, "accumulation": accumulation, "schedule": "constant"},
            "engine": {"device": "cpu"},
        }
    )
    data = federate(experiment.data, experiment.federation, 0)
    vlm = attach_lora(load_model(experiment.model, torch.device("cpu")), experiment.lora, 0)
    clients = {name: list(samples[:SAMPLES]) for name, samples in itertools.islice(data.clients.items(), cohort)}
    encoder = Encoder(vlm, "agnostic")
    for sample in itertools.chain(*clients.values()):
        encoder(sample)
    return Workload(experiment, clients, vlm, read_weights(vlm.model), encoder)


def collate_with_labels(vlm: VisionLanguageModel, samples: list[Encoded]) -> dict[str, Any]:
    """A batch as Transformers' own loss takes it."""
    batch = collate(vlm, samples)
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    for row, sample in enumerate(samples):
        labels[row, -sample.answer_length :] = sample.answer_ids
    return {**batch.inputs, "labels": labels}
