"""FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models. Singhal et al., ACL 2025."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.base import Aggregate, ServerState, client_weights, merge
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.types import ClientUpdate, Slots, Weights


@dataclass(frozen=True)
class FedExLoRA(FedAvg):
    """Factors are averaged as in FedIT; what their product lacks of the mean product goes into the frozen weights.

        A <- sum p_k A_k,   B <- sum p_k B_k,   W <- W + (alpha / r) (sum_k p_k B_k A_k - B A)

    The residual travels as factors, of rank K r with K clients in the cohort: sum_k p_k (B_k - B) A_k is the same matrix.
    """

    kind = "lora"
    exact = True
    needs_individual_updates = True
    changes_frozen = True
    takes_stale_updates = False

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """The client's factors."""
        return {"weights": client_weights(state, update)}, update.weight

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The rule above; the residual is taken to the factors as rounded."""
        weights = W.add(W.zeros_like(state.weights), aggregate.mean_over_members("weights"))
        members = [self._without(member.slots["weights"], weights) for member in aggregate.members]
        return state.after(weights, **merge(state, factors.stack(members, [m.share for m in aggregate.members])))

    def _without(self, own: Weights, mean: Weights) -> Weights:
        """A client's factors with the mean B taken off its own."""
        return {name: tensor.double() - mean[name].double() if factors.is_b(name) else tensor for name, tensor in own.items()}
