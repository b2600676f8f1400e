"""Ditto: Fair and Robust Federated Learning Through Personalization. Li et al., ICML 2021."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.base import Client, ServerState, require_not_negative
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.fedprox import Proximal
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast, Slots, Weights


@dataclass(frozen=True)
class Ditto(FedAvg):
    """FedAvg, and beside it every client trains a model of its own, which strategies do not reach, and which is held near the global one.

        v_k <- local training of  loss(v) + (personal_mu / 2) ||v - w||^2,   from its last v_k, at first from w

    The personal pass takes as long as the other one, and sends nothing. What a strategy adds to training is for the global model's sake
    and leaves v_k alone; v_k feels it through w only, though the method is scored by v_k. ``personal_mu = 0`` leaves v_k to the client's data alone.

    Attributes:
        personal_mu: how strongly v_k is held.
    """

    personal_mu: float = 0.1
    kind = "personalized"
    personalized = True

    def __post_init__(self) -> None:
        require_not_negative(personal_mu=self.personal_mu)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Plain training, then the client's own model."""
        terms = (Proximal(self.personal_mu),) if self.personal_mu else ()
        return LocalRule(personal=LocalRule(terms=terms, start=client.state.get("personal", {})))

    def personal(self, state: ServerState, client_state: Slots) -> Weights:
        """v_k; the global weights for a client that never took part."""
        return client_state.get("personal", state.weights)
