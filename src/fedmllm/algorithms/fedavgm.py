"""Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification. Hsu et al., arXiv 1909.06335, 2019."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import weights as W
from fedmllm.algorithms.base import zeros
from fedmllm.algorithms.checks import require_positive, require_within
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.state import Aggregate, ServerState
from fedmllm.types import Weights

MOMENTUM = "momentum"
"""The server's momentum m, in float64."""


@dataclass(frozen=True)
class FedAvgM(FedAvg):
    """FedAvg with server momentum: ``m <- beta1 m + D``, ``w <- w + server_learning_rate m``.

    ``beta1 = 0`` with ``server_learning_rate = 1`` is FedAvg. Flower's ``FedAvgM`` is the same rule, but its default momentum is 0.

    Attributes:
        beta1: decay of the momentum, in [0, 1).
        server_learning_rate: server step size, greater than 0.
        reference: use the variant of the code published with FedMLLM: ``m <- beta1 m + (1 - beta1) D``, and m = D in the first round.
    """

    beta1: float = 0.9
    server_learning_rate: float = 1.0
    reference: bool = False

    def __post_init__(self) -> None:
        require_within("beta1", self.beta1, 0, 1)
        require_positive(server_learning_rate=self.server_learning_rate)

    def init(self, weights: Weights, frozen: Weights) -> ServerState:
        """Start with momentum 0, kept in float64."""
        return ServerState(weights, slots={MOMENTUM: zeros(weights)})

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Apply the class's update rule for m and w."""
        fresh = 1 - self.beta1 if self.reference and state.round_num > 0 else 1.0
        momentum = {name: self.beta1 * m + fresh * aggregate.update[name] for name, m in state.slots[MOMENTUM].items()}
        return state.after(W.add(state.weights, momentum, self.server_learning_rate), {MOMENTUM: momentum})
