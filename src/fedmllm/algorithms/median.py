"""Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Yin et al., ICML 2018: coordinate-wise median."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmllm import weights as W
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.state import Aggregate, Member, ServerState
from fedmllm.types import UPDATE


@dataclass(frozen=True)
class Median(FedAvg):
    """``w <- w + median_k D_k`` in every coordinate. With an even number of clients it is the mean of the two middle values.

    The server must see every update individually and ignores their weights, so strategies that reweigh updates cannot be combined with
    it. A round needs at least 3 clients, because the median of fewer is their mean. Flower's ``FedMedian`` takes the median of the
    clients' weights, which gives the same result.
    """

    kind = "robust"
    needs_individual_updates = True
    ignores_weights = True
    uniform_weights = True

    @property
    def smallest_cohort(self) -> int:
        """Three clients: the median of fewer is the mean."""
        return 3

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Add the robust center (``middle``) of each tensor's updates."""
        robust = {name: self.middle(stacked(aggregate.members, name)) for name in aggregate.members[0].slots[UPDATE]}
        return state.after(W.add(state.weights, robust))

    def middle(self, updates: Tensor) -> Tensor:
        """Return the median over clients, the first axis."""
        ordered, half = updates.sort(dim=0).values, len(updates) // 2
        return (ordered[(len(updates) - 1) // 2] + ordered[half]) / 2


def stacked(members: Sequence[Member], name: str) -> Tensor:
    """Stack one tensor of all clients' updates in float64, shape (clients, ...)."""
    return torch.stack([member.slots[UPDATE][name].double() for member in members])
