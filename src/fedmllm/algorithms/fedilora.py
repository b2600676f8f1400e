"""FediLoRA: Heterogeneous LoRA for Federated Multimodal Fine-tuning under Missing Modalities. Yang et al., arXiv 2509.06984, 2025."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.checks import require_within
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.state import Aggregate, Client, ServerState
from fedmllm.training.rules import LocalResult, LocalRule, Upload
from fedmllm.types import UPDATE, Broadcast, ClientUpdate, Slots, Weights

PRESENT = "present"
"""Ones at the rank indices that a client has, zeros elsewhere; their mean is the share of the weight that has each index."""


@dataclass(frozen=True)
class FediLoRA(FedAvg):
    """Averages each rank index over the clients that have it. Clients edit the one A that has drifted furthest.

        A[i] <- sum_{k: r_k > i} p_k A_k[i] / sum_{k: r_k > i} p_k,   B[:, i] likewise

    From the second round on, before uploading, a client finds the A with the lowest cosine similarity s to the A it received. If
    ``s < edit_threshold``, it replaces that A with ``s A_k + (1 - s) A``. With equal ranks and ``edit_threshold = -1`` this is FedAvg.

    Attributes:
        edit_threshold: cosine similarity below which a tensor is edited, in [-1, 1]; -1 disables editing.
    """

    edit_threshold: float = 0.95
    kind = "lora"
    heterogeneous_ranks = True
    takes_stale_updates = False

    def __post_init__(self) -> None:
        require_within("edit_threshold", self.edit_threshold, -1, 1 + 1e-9)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Train without further terms, then edit the A that has drifted furthest."""
        return LocalRule(finish=self._finish) if self.edit_threshold > -1 and broadcast.round_num > 0 else LocalRule()

    def _finish(self, result: LocalResult) -> Upload:
        return Upload(self.repaired(result.weights, result.received))

    def repaired(self, own: Weights, received: Weights) -> Weights:
        """Return the client's tensors, with at most one A moved back toward the A it received."""
        similar = {
            name: float(F.cosine_similarity(own[name].flatten(), received[name].flatten(), dim=0)) for name in own if factors.is_a(name)
        }
        name = min(similar, key=lambda n: (similar[n], n))
        if similar[name] >= self.edit_threshold:
            return own
        return {**own, name: similar[name] * own[name] + (1 - similar[name]) * received[name]}

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """Return the update padded to the global rank, and ones at the rank indices that the client has."""
        ones = {name: torch.ones_like(tensor) for name, tensor in update.update.items()}
        slots = {kind: factors.padded(tensors, state.weights) for kind, tensors in ((UPDATE, update.update), (PRESENT, ones))}
        return slots, update.weight

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Apply the class's rule. Rank indices that no client of the cohort has do not change."""
        present = aggregate.mean[PRESENT]
        mean = {name: tensor / present[name].where(present[name] > 0, 1.0) for name, tensor in aggregate.update.items()}
        return state.after(W.add(state.weights, mean))
