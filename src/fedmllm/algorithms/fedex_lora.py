"""FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models. Singhal et al., ACL 2025."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.base import client_weights, merge
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.state import Aggregate, ServerState
from fedmllm.types import WEIGHTS, ClientUpdate, Slots, Weights


@dataclass(frozen=True)
class FedExLoRA(FedAvg):
    """Averages the factors as in FedIT, and adds the difference between the mean product and the product of means to the frozen weights.

        A <- sum p_k A_k,   B <- sum p_k B_k,   W <- W + (alpha / r) (sum_k p_k B_k A_k - B A)

    The server sends this difference as factors of rank K r, with K clients in the cohort, because it equals sum_k p_k (B_k - B) A_k.
    """

    kind = "lora"
    exact = True
    needs_individual_updates = True
    changes_frozen = True
    takes_stale_updates = False

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """Return the client's factors, weighted by sample count."""
        return {WEIGHTS: client_weights(state, update)}, update.weight

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Apply the class's rule. The difference is computed from the mean factors after rounding to float32."""
        weights = W.add(W.zeros_like(state.weights), aggregate.mean_over_members(WEIGHTS))
        members = [self._without(member.slots[WEIGHTS], weights) for member in aggregate.members]
        return state.after(weights, merge(state, factors.stack(members, [m.share for m in aggregate.members])))

    def _without(self, own: Weights, mean: Weights) -> Weights:
        """Return a client's factors with the mean B subtracted from its own B."""
        return {name: tensor.double() - mean[name].double() if factors.is_b(name) else tensor for name, tensor in own.items()}
