"""Improving LoRA in Privacy-preserving Federated Learning. Sun et al., ICLR 2024 (FFA-LoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.state import Client
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast


@dataclass(frozen=True)
class FFALoRA(FedAvg):
    """Freezes A at the initialization that all clients share. Only B is trained, sent and averaged.

        B <- sum_k p_k B_k,   so that   B A_0 = sum_k p_k B_k A_0   exactly

    Uploads and downloads are half as large as FedAvg's.
    """

    kind = "lora"
    exact = True

    def uploads(self, round_num: int, name: str) -> bool:
        """Upload B and all tensors that are not LoRA factors."""
        return not factors.is_a(name)

    def downloads(self, name: str) -> bool:
        """Download B and all tensors that are not LoRA factors. Clients derive A from the seed."""
        return not factors.is_a(name)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Train only the tensors that are uploaded."""
        return LocalRule(trains=lambda name: self.uploads(broadcast.round_num, name))
