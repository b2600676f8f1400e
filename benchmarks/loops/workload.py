"""The work of every loop: the embedded model, clients with equal numbers of samples, one epoch of AdamW at a constant rate."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedmllm.config import Experiment
from fedmllm.data.federated import federate
from fedmllm.models.encoding import Encoded, collate
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import attach_lora, read_weights
from fedmllm.randomness import generator, torch_randomness
from fedmllm.training.batches import Encoder, steps
from fedmllm.types import Sample, Weights

SAMPLES = 24
"""Samples of each client."""

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "nano": {},
    "3b": {
        "text_config": {
            **{"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36},
            **{"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128},
        },
        "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "num_hidden_layers": 32, "num_attention_heads": 16},
    },
}
"""The embedded model, or its architecture with random weights in the dimensions of Qwen2.5-VL-3B."""

Go = Callable[[], bool]
"""Waits until a round is requested; returns false if there will be no more."""
Done = Callable[[float, Weights], None]
"""Receives a round's seconds and the mean of the clients' weights after it."""


@dataclass(frozen=True)
class Workload:
    """The work of a cohort's round.

    Attributes:
        experiment: model, data and training.
        clients: the samples of each client, equally many.
        vlm: the model with adapters.
        start: what the clients receive.
        encoder: turns samples into tensors and keeps them.
    """

    experiment: Experiment
    clients: dict[str, list[Sample]]
    vlm: VisionLanguageModel
    start: Weights
    encoder: Encoder

    def in_order(self, client: str) -> list[Encoded]:
        """Return a client's samples in the order of our first round."""
        training, encoded = self.experiment.training, [self.encoder(sample) for sample in self.clients[client]]
        rng = generator(self.experiment.seed, "order", 0, client, 0)
        return [sample for step in steps(encoded, training.batch_size, training.accumulation, rng) for sample in step.samples]


def workload(cohort: int, batch_size: int, accumulation: int, size: str = "nano", device: str = "cpu") -> Workload:
    """Build the work. Everything is encoded once, so that no loop's time includes decoding pictures."""
    experiment = Experiment.parse(
        {
            "data": {"num_train": cohort * SAMPLES, "num_test": 100},
            "federation": {"num_clients": cohort, "clients_per_round": cohort, "partition": "iid"},
            "training": {"batch_size": batch_size, "accumulation": accumulation, "schedule": "constant"},
            # The other loops use PyTorch's own products; ours switches oneDNN on.
            "model": {"dtype": "float32" if device == "cpu" else "bfloat16", "onednn": False},
            "engine": {"device": device},
        }
    )
    data = federate(experiment.data, experiment.federation, 0)
    vlm = attach_lora(_resized(load_model(experiment.model, torch.device(device)), SIZES[size]), experiment.lora, 0)
    encoder = Encoder(vlm, "agnostic")
    for sample in itertools.chain(*data.clients.values()):
        encoder(sample)
    return Workload(experiment, {name: list(samples) for name, samples in data.clients.items()}, vlm, read_weights(vlm.model), encoder)


def _resized(vlm: VisionLanguageModel, dimensions: dict[str, dict[str, int]]) -> VisionLanguageModel:
    """Return the model with other dimensions and random weights, or unchanged if there are no other dimensions."""
    if not dimensions:
        return vlm
    config = vlm.model.config
    for part, values in dimensions.items():
        getattr(config, part).update(values)
    with torch.device(vlm.device), torch_randomness(vlm.device, 0, "random weights"):
        model = type(vlm.model)(config).to(vlm.dtype)
    return replace(vlm, model=model.requires_grad_(False).eval())


def collate_with_labels(vlm: VisionLanguageModel, samples: list[Encoded]) -> dict[str, Any]:
    """Return a batch in the form that Transformers' own loss expects."""
    batch = collate(vlm, samples)
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    for row, sample in enumerate(samples):
        labels[row, -sample.answer_length :] = sample.answer_ids
    return {**batch.inputs, "labels": labels}
