"""Communication-Efficient Learning of Deep Networks from Decentralized Data. McMahan et al., AISTATS 2017."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.base import ServerAverage
from fedmllm.training.local import LocalRule
from fedmllm.types import Broadcast


@dataclass(frozen=True)
class FedAvg(ServerAverage):
    """``w <- w + sum_k p_k (w_k - w)`` with ``p_k = n_k / sum n`` over the cohort; clients train plainly."""

    def local_rule(self, broadcast: Broadcast) -> LocalRule:
        """Nothing beside the loss."""
        return LocalRule()
