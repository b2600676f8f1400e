"""Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models. Cho et al., EMNLP 2024 (HetLoRA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.base import Aggregate, ServerState, client_weights
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.types import ClientUpdate, Slots


@dataclass(frozen=True)
class HetLoRA(FedAvg):
    """Factors of all ranks are padded with zeros to the largest and averaged, weighted by the size of the clients' products.

        A <- sum_k q_k [A_k; 0],   B <- sum_k q_k [B_k | 0],   q_k proportional to ||B_k A_k||_F over all modules

    A client of rank r_k receives the first r_k rows and columns. Not exact: padding dilutes the ranks that few clients have. Those
    that no client of the cohort has stay as they are: they were learnt by others, and as zeros no gradient would ever move
    them again. While all products are zero, clients count alike. The paper's pruning of ranks during training is left out: ranks are set in
    ``lora.client_ranks``.
    """

    kind = "lora"
    heterogeneous_ranks = True
    takes_stale_updates = False

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """The padded factors' distance to the global ones, and ones for the client's ranks, by the norm of their product."""
        own = client_weights(state, update)
        padded = factors.padded(own, state.weights)
        held = (torch.arange(factors.rank(state.weights)) < factors.rank(own)).double()
        return {"update": W.subtract(padded, state.weights), "held": {"ranks": held}}, max(factors.product_norm(own), 1e-12)

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The rule above."""
        largest = int(aggregate.mean["held"]["ranks"].count_nonzero())
        held = factors.padded(factors.cut(aggregate.mean["update"], largest), state.weights)
        return state.after(W.add(state.weights, held))
