"""Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models. Cho et al., EMNLP 2024 (HetLoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.base import ServerState, client_weights
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.types import ClientUpdate, Slots


@dataclass(frozen=True)
class HetLoRA(FedAvg):
    """Factors of all ranks are padded with zeros to the largest and averaged, weighted by the size of the clients' products.

        A <- sum_k q_k [A_k; 0],   B <- sum_k q_k [B_k | 0],   q_k proportional to ||B_k A_k||_F over all modules

    A client of rank r_k receives the first r_k rows and columns. Not exact: padding dilutes the ranks that few clients have. While
    all products are zero, clients count alike. The paper's pruning of ranks during training is left out: ranks are set in
    ``lora.client_ranks``.
    """

    kind = "lora"
    heterogeneous_ranks = True

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """The padded factors' distance to the global ones, by the norm of their product."""
        own = client_weights(state, update)
        padded = factors.padded(own, state.weights)
        return {"update": W.subtract(padded, state.weights)}, max(factors.product_norm(own), 1e-12)
