"""Improving LoRA in Privacy-preserving Federated Learning. Sun et al., ICLR 2024 (FFA-LoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm.algorithms.base import Client
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast


@dataclass(frozen=True)
class FFALoRA(FedAvg):
    """A stays at the initialization that all share; B alone trains, travels and is averaged.

        B <- sum_k p_k B_k,   so that   B A_0 = sum_k p_k B_k A_0   exactly

    Half the bytes in both directions.
    """

    kind = "lora"
    exact = True

    def uploads(self, round_num: int, name: str) -> bool:
        """B, and whatever is no factor."""
        return not factors.is_a(name)

    def downloads(self, name: str) -> bool:
        """The same: A follows from the seed."""
        return not factors.is_a(name)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Only what is sent trains."""
        return LocalRule(trains=lambda name: self.uploads(broadcast.round_num, name))
