"""Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Yin et al., ICML 2018: coordinate-wise median."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmllm import weights as W
from fedmllm.algorithms.base import Aggregate, Member, ServerState
from fedmllm.algorithms.fedavg import FedAvg


@dataclass(frozen=True)
class Median(FedAvg):
    """``w <- w + median_k D_k`` in every coordinate; of an even number of clients the mean of the two in the middle.

    Every client's update must be seen by itself, and clients count alike, so that strategies that reweigh them are refused. Of fewer
    than 3 the median is the plain mean, so that a round needs 3. Flower's ``FedMedian`` takes the median of the weights,
    which is the same.
    """

    kind = "robust"
    needs_individual_updates = True
    ignores_weights = True
    by_head = True

    @property
    def smallest_cohort(self) -> int:
        """3."""
        return 3

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Add the robust mean of each tensor."""
        robust = {name: self.middle(stacked(aggregate.members, name)) for name in aggregate.members[0].slots["update"]}
        return state.after(W.add(state.weights, robust))

    def middle(self, updates: Tensor) -> Tensor:
        """The median along the first axis."""
        ordered, half = updates.sort(dim=0).values, len(updates) // 2
        return (ordered[(len(updates) - 1) // 2] + ordered[half]) / 2


def stacked(members: Sequence[Member], name: str) -> Tensor:
    """One tensor of all clients' updates, float64, shape (clients, ...)."""
    return torch.stack([member.slots["update"][name].double() for member in members])
