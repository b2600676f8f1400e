"""What a federated method is: a rule for its clients and a rule for its server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

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


def require_within(name: str, value: float, low: float, high: float) -> None:
    """Refuse a hyper-parameter outside [low, high).

    Raises:
        ConfigError: naming it.
    """
    if not low <= value < high:
        raise ConfigError(f"{name} must lie in [{low:g}, {high:g}), is {value}")


def require_positive(**values: float) -> None:
    """Refuse hyper-parameters that are not above 0.

    Raises:
        ConfigError: naming the first.
    """
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name} must be above 0, is {value}")
