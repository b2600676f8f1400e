"""Selective Aggregation for Low-Rank Adaptation in Federated Learning. Guo et al., ICLR 2025 (FedSA-LoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.state import Client, ServerState
from fedmllm.training.rules import LocalResult, LocalRule, Upload
from fedmllm.types import Broadcast, Slots, Weights

OWN = "own"
"""The factors B that a client keeps for itself."""


@dataclass(frozen=True)
class FedSALoRA(FedAvg):
    """Shares A, ``A <- sum_k p_k A_k``. Every client trains both factors and keeps its own B.

    Uploads and downloads are half as large as FedAvg's. There is no global model: the method is scored on the personalized models. A
    client that never took part has B = 0, so it answers like the pretrained model.
    """

    kind = "personalized"
    personalized = True

    def uploads(self, round_num: int, name: str) -> bool:
        """Upload A and all tensors that are not LoRA factors."""
        return not factors.is_b(name)

    def downloads(self, name: str) -> bool:
        """Download A and all tensors that are not LoRA factors."""
        return not factors.is_b(name)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Train from the shared A and the client's own B, and keep the new B at the client."""
        own = frozenset(filter(factors.is_b, broadcast.weights))
        return LocalRule(start=client.state.get(OWN, {}), own=own, finish=self._finish)

    def _finish(self, result: LocalResult) -> Upload:
        own = {name: tensor for name, tensor in result.weights.items() if factors.is_b(name)}
        return Upload(result.weights, keeps={OWN: own})

    def personal(self, state: ServerState, client_state: Slots) -> Weights:
        """Return the shared A with the client's B."""
        return {**state.weights, **client_state.get(OWN, {})}
