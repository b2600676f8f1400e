"""What a federated method is: a rule for its clients and a rule for its server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fedmllm import weights as W
from fedmllm.errors import ConfigError
from fedmllm.training.local import LocalRule
from fedmllm.types import Broadcast, Weights


@dataclass(frozen=True)
class ServerState:
    """Everything the server must remember from one round to the next.

    Attributes:
        weights: the global weights, float32.
        round_num: rounds finished.
        slots: further tensors of the method by name (momentum, server controls), each shaped like the weights.
    """

    weights: Weights
    round_num: int = 0
    slots: Mapping[str, Weights] = field(default_factory=dict)


class Algorithm(Protocol):
    """One method. Instances hold hyper-parameters only; all that changes is in the state."""

    needs_individual_updates: bool
    """True where the server must see each update by itself, which rules out streaming and secure aggregation."""

    def init(self, weights: Weights) -> ServerState:
        """The state before the first round."""
        ...

    def broadcast(self, state: ServerState) -> Broadcast:
        """What the cohort receives."""
        ...

    def local_rule(self, broadcast: Broadcast) -> LocalRule:
        """How a client trains."""
        ...

    def weight(self, num_samples: int) -> float:
        """What an update of a client with that many samples weighs in the mean."""
        ...

    def server_step(self, state: ServerState, aggregate: Weights) -> ServerState:
        """The state after a round, from the weighted mean of the updates (float64)."""
        ...


class ServerAverage:
    """The common server: ``w <- w + D`` with D the mean update weighted by numbers of samples."""

    needs_individual_updates = False

    def init(self, weights: Weights) -> ServerState:
        """The weights alone."""
        return ServerState(weights)

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global weights."""
        return Broadcast(state.round_num, state.weights)

    def weight(self, num_samples: int) -> float:
        """The number of samples."""
        return float(num_samples)

    def server_step(self, state: ServerState, aggregate: Weights) -> ServerState:
        """Add the mean update, in float64, rounded once to float32."""
        return replace(state, weights=W.add(state.weights, aggregate), round_num=state.round_num + 1)


@dataclass(frozen=True)
class AdaptiveServer(ServerAverage):
    """Adaptive Federated Optimization. Reddi et al., ICLR 2021: the server of FedAdagrad, FedAdam and FedYogi.

        m <- beta1 m + (1 - beta1) D,   m_0 = 0
        v <- second(v, D^2),            v_0 = tau^2
        w <- w + server_learning_rate m / (sqrt(v) + tau)

    D is the plain mean of the updates; there is no bias correction. All element by element, in float64.

    Attributes:
        server_learning_rate: the step's size.
        beta1: how much of the momentum stays, in [0, 1).
        tau: bounds the adaptivity, above 0.
        reference: the variant of the code published with FedMLLM: m = D in the first round, and ``second(v, m^2)``.
    """

    server_learning_rate: float = 1e-3
    beta1: float = 0.9
    tau: float = 1e-3
    reference: bool = False

    def __post_init__(self) -> None:
        require_within("beta1", self.beta1, 0, 1)
        if self.tau <= 0 or self.server_learning_rate <= 0:
            raise ConfigError(
                f"tau and server_learning_rate must be above 0, are {self.tau} and {self.server_learning_rate}; the paper's are 1e-3 and up"
            )

    def init(self, weights: Weights) -> ServerState:
        """Momentum 0 and second moment tau^2."""
        zeros = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in weights.items()}
        return ServerState(weights, slots={"momentum": zeros, "second_moment": {k: v + self.tau**2 for k, v in zeros.items()}})

    def weight(self, num_samples: int) -> float:
        """Every client counts alike."""
        return 1.0

    def local_rule(self, broadcast: Broadcast) -> LocalRule:
        """Nothing beside the loss."""
        return LocalRule()

    def server_step(self, state: ServerState, aggregate: Weights) -> ServerState:
        """The rule above."""
        first = self.reference and state.round_num == 0
        decay = 0.0 if first else self.beta1
        momentum = {name: decay * m + (1 - decay) * aggregate[name] for name, m in state.slots["momentum"].items()}
        squared = momentum if self.reference else aggregate
        second = {name: self.second(v, squared[name].square()) for name, v in state.slots["second_moment"].items()}
        step = {name: m / (second[name].sqrt() + self.tau) for name, m in momentum.items()}
        slots = {"momentum": momentum, "second_moment": second}
        return ServerState(W.add(state.weights, step, self.server_learning_rate), state.round_num + 1, slots)

    def second(self, previous: Tensor, square: Tensor) -> Tensor:
        """The next second moment."""
        raise NotImplementedError


def require_within(name: str, value: float, low: float, high: float) -> None:
    """Refuse a hyper-parameter outside [low, high).

    Raises:
        ConfigError: naming it.
    """
    if not low <= value < high:
        raise ConfigError(f"{name} must lie in [{low:g}, {high:g}), is {value}")
