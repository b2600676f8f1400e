"""Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization. Wang et al., NeurIPS 2020."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedmllm import weights as W
from fedmllm.algorithms.base import Fact
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.state import Aggregate, ServerState
from fedmllm.types import UPDATE, ClientUpdate, Slots

STEPS = "steps"
"""A client's number of optimizer steps, tau_k, in one tensor of the same name."""


@dataclass(frozen=True)
class FedNova(FedAvg):
    """Averages updates per local step, so that clients that take more steps do not pull the optimum toward themselves.

        w <- w + tau sum_k p_k D_k / tau_k,   tau = sum_k p_k tau_k

    tau_k is the client's number of optimizer steps. This is the paper's rule for plain local steps of equal size, which AdamW's steps
    are to first order. If all clients take the same number of steps, this is FedAvg. Clients must report their number of steps. A
    client that took no step contributes a zero update.
    """

    @property
    def needs(self) -> frozenset[Fact]:
        """The number of optimizer steps, tau_k."""
        return frozenset({"steps"})

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """Return the update per step and the number of steps, weighted by sample count."""
        steps = update.metrics["steps"]
        each = {name: tensor.double() / max(1.0, steps) for name, tensor in update.update.items()}
        return {UPDATE: each, STEPS: {STEPS: torch.tensor([steps], dtype=torch.float64)}}, update.weight

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Add the mean update per step times the mean number of steps."""
        return state.after(W.add(state.weights, aggregate.update, float(aggregate.mean[STEPS][STEPS])))
