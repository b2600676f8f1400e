"""Selective Aggregation for Low-Rank Adaptation in Federated Learning. Guo et al., ICLR 2025 (FedSA-LoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm.algorithms.base import Client, ServerState
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.training.rules import LocalResult, LocalRule, Upload
from fedmllm.types import Broadcast, Slots, Weights


@dataclass(frozen=True)
class FedSALoRA(FedAvg):
    """A is shared, ``A <- sum_k p_k A_k``; every client trains both and keeps its own B.

    Half the bytes in both directions. There is no global model: the method is scored by the clients' own, and a client that
    never took part answers with B = 0, as the model did before.
    """

    kind = "personalized"
    personalized = True

    def uploads(self, round_num: int, name: str) -> bool:
        """A, and whatever is no factor."""
        return not factors.is_b(name)

    def downloads(self, name: str) -> bool:
        """The same."""
        return not factors.is_b(name)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """From the shared A and the client's B."""
        own = frozenset(filter(factors.is_b, broadcast.weights))
        return LocalRule(start=client.state.get("own", {}), own=own, finish=self._finish)

    def _finish(self, result: LocalResult) -> Upload:
        own = {name: tensor for name, tensor in result.weights.items() if factors.is_b(name)}
        return Upload(result.weights, keeps={"own": own})

    def personal(self, state: ServerState, client_state: Slots) -> Weights:
        """The shared A with the client's B."""
        return {**state.weights, **client_state.get("own", {})}
