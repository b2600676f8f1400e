"""Lists the tested models and describes a model's plan, for ``fedmllm models list`` and ``plan``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from fedmllm.models.families import TESTED, family_of
from fedmllm.models.plan import make_plan
from fedmllm.types import Record

if TYPE_CHECKING:
    from fedmllm.config import Experiment

TOKENS = (256, 1024, 4096, 16384)
"""Numbers of tokens in a pass, padding included, for which a plan gives the memory."""
CARDS = (8, 16, 24, 40, 80)
"""GPU memory sizes in GiB for which a plan gives the largest pass."""
_USABLE = 0.9
"""Share of a GPU's memory that a plan counts on. The rest is for temporary memory of the backward pass and for fragmentation."""


def catalog() -> dict[str, Record]:
    """Return every tested ``model_type`` with its models, its family, and the kind of model that the tests use."""
    tested = "a tiny model of its architecture with random weights and its own kind of processor"
    return {
        kind: {"models": models, "family": type(family_of(kind)).__module__.rpartition(".")[2], "tested_on": tested}
        for kind, models in TESTED.items()
    }


def describe(experiment: Experiment) -> Record:
    """Return a model's plan as JSON, with sizes in bytes."""
    plan = make_plan(experiment.model, experiment.lora)
    fixed = plan.memory(0, _parallel_clients(experiment))
    room = {card: int((_USABLE * card * 2**30 - fixed) / plan.bytes_per_token) for card in CARDS}
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
    """Return how many clients' adapters, gradients and optimizer states are in memory at once."""
    return min(experiment.engine.parallel_clients, experiment.federation.clients_per_round) if experiment.lora.trains_in_parallel else 1
