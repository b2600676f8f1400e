"""Ditto: Fair and Robust Federated Learning Through Personalization. Li et al., ICML 2021."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.checks import require_not_negative
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.fedprox import Proximal
from fedmllm.algorithms.state import Client, ServerState
from fedmllm.training.rules import LocalRule
from fedmllm.types import PERSONAL, Broadcast, Slots, Weights


@dataclass(frozen=True)
class Ditto(FedAvg):
    """FedAvg in which every client also trains a personalized model that a proximal term keeps close to the global one.

        v_k <- local training of  loss(v) + (personal_mu / 2) ||v - w||^2,   from its last v_k, at first from w

    Training v_k takes as long as training the update, and nothing of v_k is sent. Strategies change the training of the update only:
    they affect v_k just through w, although the method is scored on v_k. With ``personal_mu = 0``, v_k depends on the client's data alone
    after its start at w.

    Attributes:
        personal_mu: strength of the pull of v_k toward w.
    """

    personal_mu: float = 0.1
    kind = "personalized"
    personalized = True

    def __post_init__(self) -> None:
        require_not_negative(personal_mu=self.personal_mu)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Train the update as in FedAvg, then the personalized model."""
        terms = (Proximal(self.personal_mu),) if self.personal_mu else ()
        return LocalRule(personal=LocalRule(terms=terms, start=client.state.get(PERSONAL, {})))

    def personal(self, state: ServerState, client_state: Slots) -> Weights:
        """Return v_k, or the global weights for a client that never took part."""
        return client_state.get(PERSONAL, state.weights)
