"""Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models. Cho et al., EMNLP 2024 (HetLoRA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.base import client_weights
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.state import Aggregate, ServerState
from fedmllm.types import UPDATE, ClientUpdate, Slots

HELD = "held"
"""Ones at the rank indices that a client has, in one tensor ``RANKS``."""
RANKS = "ranks"
"""The name of the tensor in ``HELD``."""


@dataclass(frozen=True)
class HetLoRA(FedAvg):
    """Pads the factors with zeros to the largest rank and averages them, weighted by the norms of the clients' products.

        A <- sum_k q_k [A_k; 0],   B <- sum_k q_k [B_k | 0],   q_k proportional to ||B_k A_k||_F over all modules

    A client of rank r_k receives the first r_k rows and columns. The method is not exact: padding dilutes rank indices that few clients
    have. Rank indices that no client of the cohort has do not change: other clients trained them, and once zero, no gradient could move
    them again. While all products are zero, the weights are uniform. The paper's pruning of ranks during training is not implemented;
    ranks are set in ``lora.client_ranks``.
    """

    kind = "lora"
    heterogeneous_ranks = True
    takes_stale_updates = False

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """Return the padded factors minus the global ones, and ones for the client's rank indices, weighted by the norm of its product."""
        own = client_weights(state, update)
        padded = factors.padded(own, state.weights)
        held = (torch.arange(factors.rank(state.weights)) < factors.rank(own)).double()
        return {UPDATE: W.subtract(padded, state.weights), HELD: {RANKS: held}}, max(factors.product_norm(own), 1e-12)

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Add the mean difference at the rank indices that the cohort has."""
        largest = int(aggregate.mean[HELD][RANKS].count_nonzero())
        held = factors.padded(factors.cut(aggregate.update, largest), state.weights)
        return state.after(W.add(state.weights, held))
