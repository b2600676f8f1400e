"""FediLoRA: Heterogeneous LoRA for Federated Multimodal Fine-tuning under Missing Modalities. Yang et al., arXiv 2509.06984, 2025."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.base import Aggregate, Client, ServerState, require_within
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.training.rules import LocalResult, LocalRule, Upload
from fedmllm.types import Broadcast, ClientUpdate, Slots, Weights


@dataclass(frozen=True)
class FediLoRA(FedAvg):
    """Every rank index is averaged over the clients that have it; clients repair the tensor that has gone furthest astray.

        A[i] <- sum_{k: r_k > i} p_k A_k[i] / sum_{k: r_k > i} p_k,   B[:, i] likewise

    From the second round on, before sending, a client takes the A whose cosine s with the A it received is lowest and, if
    ``s < edit_threshold``, sets it to ``s A_k + (1 - s) A``. With equal ranks and ``edit_threshold = -1`` this is FedAvg.

    Attributes:
        edit_threshold: similarity below which a tensor is repaired, in [-1, 1]; -1 for never.
    """

    edit_threshold: float = 0.95
    kind = "lora"
    heterogeneous_ranks = True
    takes_stale_updates = False

    def __post_init__(self) -> None:
        require_within("edit_threshold", self.edit_threshold, -1, 1 + 1e-9)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Plain training, then the repair."""
        return LocalRule(finish=self._finish) if self.edit_threshold > -1 and broadcast.round_num > 0 else LocalRule()

    def _finish(self, result: LocalResult) -> Upload:
        return Upload(self.repaired(result.weights, result.received))

    def repaired(self, own: Weights, received: Weights) -> Weights:
        """The client's tensors, one A pulled back."""
        similar = {
            name: float(F.cosine_similarity(own[name].flatten(), received[name].flatten(), dim=0)) for name in own if factors.is_a(name)
        }
        name = min(similar, key=lambda n: (similar[n], n))
        if similar[name] >= self.edit_threshold:
            return own
        return {**own, name: similar[name] * own[name] + (1 - similar[name]) * received[name]}

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """The padded update, and ones where the client has a rank."""
        ones = {name: torch.ones_like(tensor) for name, tensor in update.update.items()}
        slots = {kind: factors.padded(tensors, state.weights) for kind, tensors in (("update", update.update), ("present", ones))}
        return slots, update.weight

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The rule above; ranks that no client of the cohort has stay as they are."""
        present = aggregate.mean["present"]
        mean = {name: tensor / present[name].where(present[name] > 0, 1.0) for name, tensor in aggregate.mean["update"].items()}
        return state.after(W.add(state.weights, mean))
