"""Federated Optimization in Heterogeneous Networks. Li et al., MLSys 2020."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmllm.algorithms.base import ServerAverage
from fedmllm.errors import ConfigError
from fedmllm.training.local import LocalRule
from fedmllm.types import Broadcast


@dataclass(frozen=True)
class FedProx(ServerAverage):
    """FedAvg whose clients minimize ``loss + (mu / 2) ||w - w_global||^2``; ``proximal_mu = 0`` is FedAvg.

    Attributes:
        proximal_mu: mu, the pull towards the global weights.
    """

    proximal_mu: float = 0.01

    def __post_init__(self) -> None:
        if self.proximal_mu < 0:
            raise ConfigError(f"proximal_mu must not be negative, is {self.proximal_mu}; 0 is FedAvg")

    def local_rule(self, broadcast: Broadcast) -> LocalRule:
        """The proximal term over all trainable tensors; none at all for mu = 0, so that FedAvg comes out bit for bit."""
        return LocalRule(penalty=self._penalty if self.proximal_mu else None)

    def _penalty(self, current: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Tensor:
        squares = [(tensor - anchor[name]).square().sum() for name, tensor in current.items()]
        return 0.5 * self.proximal_mu * torch.stack(squares).sum()
