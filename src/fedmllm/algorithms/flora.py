"""FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations. Wang et al., NeurIPS 2024."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmllm import factors
from fedmllm.algorithms.base import Aggregate, Kind, ServerState, client_weights, mean_of_others, merge
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.types import ClientUpdate, Slots


@dataclass(frozen=True)
class FLoRA(FedAvg):
    """Factors are stacked, their product is merged into the frozen weights, and new factors are drawn.

        A = [p_1 A_1; ...; p_K A_K],   B = [B_1 | ... | B_K],   W <- W + (alpha / r) B A,   then A <- A_0, B <- 0

    Exact, for clients of any ranks. What travels down is the stack, whose rank is the sum of the cohort's, to every client:
    each must keep its frozen weights up to date. Tensors that are no factors are averaged.
    """

    kind: ClassVar[Kind] = "lora"
    exact = True
    heterogeneous_ranks = True
    needs_individual_updates = True
    changes_frozen = True
    takes_stale_updates = False

    def downloads(self, name: str) -> bool:
        """No factors: new ones are drawn from the seed, and the stack is counted by itself."""
        return not (factors.is_a(name) or factors.is_b(name))

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """The client's factors at its own rank."""
        return {"weights": client_weights(state, update)}, update.weight

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The rule above."""
        members = aggregate.members
        stacked = factors.stack([m.slots["weights"] for m in members], [m.share for m in members])
        return state.after({**state.weights, **mean_of_others(aggregate)}, **merge(state, stacked))
