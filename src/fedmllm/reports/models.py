"""Which models are tested, and what training one takes: ``fedmllm models list`` and ``plan``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from fedmllm.models.families import TESTED, family_of
from fedmllm.models.plan import make_plan
from fedmllm.types import Record

if TYPE_CHECKING:
    from fedmllm.config import Experiment

TOKENS = (256, 1024, 4096, 16384)
"""Of a pass, padding included, for which memory is told."""
CARDS = (8, 16, 24, 40, 80)
"""GiB of memory for which the largest pass is told."""
_HEADROOM = 0.9
"""Of a card; the rest is for the backward pass's own needs and fragmentation."""


def catalog() -> dict[str, Record]:
    """Every tested ``model_type``: its models, what serves it, and on what it was tested."""
    tested = "a tiny model of its architecture with random weights and its own kind of processor"
    return {
        kind: {"models": models, "family": type(family_of(kind)).__module__.rpartition(".")[2], "tested_on": tested}
        for kind, models in TESTED.items()
    }


def describe(experiment: Experiment) -> Record:
    """A model's plan as JSON, sizes in bytes."""
    plan = make_plan(experiment.model, experiment.lora)
    fixed = plan.memory(0, _parallel_clients(experiment))
    room = {card: int((_HEADROOM * card * 2**30 - fixed) / plan.bytes_per_token) for card in CARDS}
    return {
        "model": experiment.model.name,
        "parameters": plan.parameters,
        "trainable": plan.trainable,
        "parts": [asdict(part) for part in plan.parts],
        "sent_per_client_and_round": plan.update_bytes,
        "weights": plan.weight_bytes,
        "memory_without_tokens": round(fixed),
        "kept_per_token": round(plan.bytes_per_token),
        "memory_by_tokens": {tokens: round(fixed + tokens * plan.bytes_per_token) for tokens in TOKENS},
        "tokens_by_gib": {card: max(0, tokens) for card, tokens in room.items()},
    }


def _parallel_clients(experiment: Experiment) -> int:
    """How many clients' adapters, gradients and optimizer states are held at once."""
    return min(experiment.engine.parallel_clients, experiment.federation.clients_per_round) if experiment.lora.trains_in_parallel else 1
