"""Federated Optimization in Heterogeneous Networks. Li et al., MLSys 2020."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmllm.algorithms.base import ServerAverage
from fedmllm.algorithms.checks import require_not_negative
from fedmllm.algorithms.state import Client
from fedmllm.training.rules import LocalRule
from fedmllm.training.terms import LossTerm, Parameters
from fedmllm.types import Broadcast


@dataclass(frozen=True)
class FedProx(ServerAverage):
    """FedAvg whose clients minimize ``loss + (mu / 2) ||w - w_global||^2``; ``proximal_mu = 0`` is FedAvg.

    Flower's ``FedProx`` has the same server but only sends mu; its clients must add the term themselves.

    Attributes:
        proximal_mu: mu, the strength of the pull toward the global weights.
    """

    proximal_mu: float = 0.01

    def __post_init__(self) -> None:
        require_not_negative(proximal_mu=self.proximal_mu)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Add the proximal term over all trainable tensors. With mu = 0 there is no term, so that results equal FedAvg's bit for bit."""
        return LocalRule(terms=(Proximal(self.proximal_mu),) if self.proximal_mu else ())


@dataclass(frozen=True)
class Proximal(LossTerm):
    """``(mu / 2) ||w - w_received||^2`` over the tensors it covers.

    Attributes:
        mu: strength of the pull toward the weights that the client received.
        covers: returns whether the tensor of a given name is included.
    """

    mu: float
    covers: Callable[[str], bool] = lambda name: True

    def value(self, now: Parameters, received: Parameters, progress: float) -> Tensor:
        """Return the term's value."""
        squares = [(tensor - received[name]).square().sum() for name, tensor in now.items() if self.covers(name)]
        return 0.5 * self.mu * torch.stack(squares).sum()
