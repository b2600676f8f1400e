"""Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Yin et al., ICML 2018: coordinate-wise trimmed mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmllm import weights as W
from fedmllm.algorithms.base import Aggregate, Member, ServerState, require_within
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.types import ClientUpdate, Slots


@dataclass(frozen=True)
class TrimmedMean(FedAvg):
    """In every coordinate the largest and the smallest updates are left out, and the others averaged; clients count alike.

        w <- w + mean of the K - 2 floor(trim K) middle values of D_k

    Every client's update must be seen by itself. ``trim = 0`` is the plain mean. Flower's ``FedTrimmedAvg`` trims the clients'
    weights instead of their updates, which is the same, and weighs those left alike.

    Attributes:
        trim: share of the clients left out at each end, in [0, 0.5).
    """

    trim: float = 0.2
    kind = "robust"
    needs_individual_updates = True

    def __post_init__(self) -> None:
        require_within("trim", self.trim, 0, 0.5)

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """Every client counts alike."""
        return super().fold(state, update)[0], 1.0

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Add the robust mean of each tensor."""
        robust = {name: self.middle(stacked(aggregate.members, name)) for name in aggregate.members[0].slots["update"]}
        return state.after(W.add(state.weights, robust))

    def middle(self, updates: Tensor) -> Tensor:
        """The robust mean along the first axis."""
        ordered, cut = updates.sort(dim=0).values, int(self.trim * len(updates))
        return ordered[cut : len(updates) - cut].mean(dim=0)


def stacked(members: Sequence[Member], name: str) -> Tensor:
    """One tensor of all clients' updates, float64, shape (clients, ...)."""
    return torch.stack([member.slots["update"][name].double() for member in members])
