"""Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization. Wang et al., NeurIPS 2020."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedmllm import weights as W
from fedmllm.algorithms.base import Aggregate, Fact, ServerState
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.types import ClientUpdate, Slots


@dataclass(frozen=True)
class FedNova(FedAvg):
    """Updates are averaged per local step, so that clients that take more steps do not pull the optimum towards themselves.

        w <- w + tau sum_k p_k D_k / tau_k,   tau = sum_k p_k tau_k

    tau_k is the client's number of optimizer steps: the paper's rule for plain local steps of one size, which AdamW's are to first
    order. Where all clients take equally many steps this is FedAvg. A client must tell its steps; one that took none has not moved.
    """

    @property
    def needs(self) -> frozenset[Fact]:
        """tau_k."""
        return frozenset({"steps"})

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """The update per step, and the steps."""
        steps = update.metrics["steps"]
        each = {name: tensor.double() / max(1.0, steps) for name, tensor in update.update.items()}
        return {"update": each, "steps": {"steps": torch.tensor([steps], dtype=torch.float64)}}, update.weight

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The rule above."""
        return state.after(W.add(state.weights, aggregate.mean["update"], float(aggregate.mean["steps"]["steps"])))
