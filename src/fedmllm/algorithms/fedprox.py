"""Federated Optimization in Heterogeneous Networks. Li et al., MLSys 2020."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmllm.algorithms.base import Client, ServerAverage, require_not_negative
from fedmllm.training.rules import LocalRule, Parameters, Penalty
from fedmllm.types import Broadcast


@dataclass(frozen=True)
class FedProx(ServerAverage):
    """FedAvg whose clients minimize ``loss + (mu / 2) ||w - w_global||^2``; ``proximal_mu = 0`` is FedAvg.

    Flower's ``FedProx`` has the same server, but sends only mu: its clients must add the term themselves.

    Attributes:
        proximal_mu: mu, the pull towards the global weights.
    """

    proximal_mu: float = 0.01

    def __post_init__(self) -> None:
        require_not_negative(proximal_mu=self.proximal_mu)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """The proximal term over all trainable tensors; none at all for mu = 0, so that FedAvg comes out bit for bit."""
        return LocalRule(penalty=proximal(self.proximal_mu) if self.proximal_mu else None)


def proximal(mu: float, covers: Callable[[str], bool] = lambda name: True) -> Penalty:
    """``(mu / 2) ||w - anchor||^2`` over the tensors it covers."""

    def penalty(current: Parameters, anchor: Parameters, progress: float) -> Tensor:
        squares = [(tensor - anchor[name]).square().sum() for name, tensor in current.items() if covers(name)]
        return 0.5 * mu * torch.stack(squares).sum()

    return penalty
