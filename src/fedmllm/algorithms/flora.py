"""FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations. Wang et al., NeurIPS 2024."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmllm import factors
from fedmllm.algorithms.base import Kind, client_weights, mean_of_others, merge
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.state import Aggregate, ServerState
from fedmllm.types import WEIGHTS, ClientUpdate, Slots


@dataclass(frozen=True)
class FLoRA(FedAvg):
    """Stacks the clients' factors, merges their product into the frozen weights, and starts each round from fresh factors.

        A = [p_1 A_1; ...; p_K A_K],   B = [B_1 | ... | B_K],   W <- W + (alpha / r) B A,   then A <- A_0, B <- 0

    The method is exact for clients of any rank. Every client downloads the stack, whose rank is the sum of the cohort's ranks, because
    it must keep its frozen weights up to date. Tensors that are not LoRA factors are averaged.
    """

    kind: ClassVar[Kind] = "lora"
    exact = True
    heterogeneous_ranks = True
    needs_individual_updates = True
    changes_frozen = True
    takes_stale_updates = False

    def downloads(self, name: str) -> bool:
        """Download only tensors that are not LoRA factors. Clients derive new factors from the seed; the stack is counted separately."""
        return not (factors.is_a(name) or factors.is_b(name))

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """Return the client's factors at its own rank, weighted by sample count."""
        return {WEIGHTS: client_weights(state, update)}, update.weight

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Merge the stacked product into the frozen weights and average all other tensors."""
        members = aggregate.members
        stacked = factors.stack([m.slots[WEIGHTS] for m in members], [m.share for m in members])
        return state.after({**state.weights, **mean_of_others(aggregate)}, merge(state, stacked))
