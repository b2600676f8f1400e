"""Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA. Chen et al., NeurIPS 2025 (RoLoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm.algorithms.ffa_lora import FFALoRA


@dataclass(frozen=True)
class RoLoRA(FFALoRA):
    """Alternates rounds: first B is trained and averaged while A is frozen, then A while B is frozen. Each round is exact.

    B comes first, because no gradient reaches A while B = 0. Uploads are half as large as FedAvg's. Downloads contain both factors,
    because a client may have missed rounds that changed either one.
    """

    takes_stale_updates = False

    def uploads(self, round_num: int, name: str) -> bool:
        """Upload B in rounds 0, 2, ... and A in rounds 1, 3, ..., and always the tensors that are not LoRA factors."""
        return not (factors.is_a(name) if round_num % 2 == 0 else factors.is_b(name))

    def downloads(self, name: str) -> bool:
        """Download both factors."""
        return True
