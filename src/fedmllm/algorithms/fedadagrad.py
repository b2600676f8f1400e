"""Adaptive Federated Optimization. Reddi et al., ICLR 2021: the Adagrad server."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmllm import weights as W
from fedmllm.algorithms.base import zeros
from fedmllm.algorithms.checks import require_positive, require_within
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.fedavgm import MOMENTUM
from fedmllm.algorithms.state import Aggregate, ServerState
from fedmllm.errors import ConfigError
from fedmllm.types import Weights

SECOND_MOMENT = "second_moment"
"""The server's second moment v, in float64."""


@dataclass(frozen=True)
class FedAdagrad(FedAvg):
    """Adaptive server optimization with ``second(v, s) = v + s``. FedAdam and FedYogi differ in ``second``.

        m <- beta1 m + (1 - beta1) D,   m_0 = 0
        v <- second(v, D^2),            v_0 = tau^2
        w <- w + server_learning_rate m / (sqrt(v) + tau)

    D is the mean of the updates with uniform weights. All operations are elementwise in float64, without bias correction. As published,
    FedAdagrad has beta1 = 0, so that m = D in every round; FedAdam and FedYogi have beta1 = 0.9. Flower's adaptive servers weight D by
    sample counts and start at v_0 = 0.

    Attributes:
        server_learning_rate: server step size, greater than 0.
        beta1: decay of the momentum, in [0, 1).
        tau: lower bound on the denominator, greater than 0; it limits the adaptivity.
        reference: use the variant of the code published with FedMLLM: m = D in the first round, and ``second(v, m^2)``. Its FedAdagrad
            has no momentum, so beta1 must be 0.
    """

    server_learning_rate: float = 1e-3
    beta1: float = 0.0
    tau: float = 1e-3
    reference: bool = False
    uniform_weights = True

    def __post_init__(self) -> None:
        if self.reference and self.beta1 != 0:
            raise ConfigError(f"reference: the published code's FedAdagrad has no momentum, got beta1 = {self.beta1:g}; remove one of them")
        self._require_ranges()

    def _require_ranges(self) -> None:
        require_within("beta1", self.beta1, 0, 1)
        require_positive(tau=self.tau, server_learning_rate=self.server_learning_rate)

    def init(self, weights: Weights, frozen: Weights) -> ServerState:
        """Start with momentum 0 and second moment tau^2."""
        second = {name: tensor + self.tau**2 for name, tensor in zeros(weights).items()}
        return ServerState(weights, slots={MOMENTUM: zeros(weights), SECOND_MOMENT: second})

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Apply the class's update rule for m, v and w."""
        update = aggregate.update
        first = self.reference and state.round_num == 0
        decay = 0.0 if first else self.beta1
        momentum = {name: decay * m + (1 - decay) * update[name] for name, m in state.slots[MOMENTUM].items()}
        squared = momentum if self.reference else update
        second = {name: self.second(v, squared[name].square()) for name, v in state.slots[SECOND_MOMENT].items()}
        step = {name: m / (second[name].sqrt() + self.tau) for name, m in momentum.items()}
        return state.after(W.add(state.weights, step, self.server_learning_rate), {MOMENTUM: momentum, SECOND_MOMENT: second})

    def second(self, previous: Tensor, square: Tensor) -> Tensor:
        """Return the next second moment, given the previous one and this round's square."""
        return previous + square
