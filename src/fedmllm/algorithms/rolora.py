"""Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA. Chen et al., NeurIPS 2025 (RoLoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm.algorithms.ffa_lora import FFALoRA


@dataclass(frozen=True)
class RoLoRA(FFALoRA):
    """Rounds alternate: B trains and is averaged while A rests, then A while B rests; each round is exact.

    B comes first, since with B = 0 no gradient reaches A. Half the bytes up; down both factors, as a client that is drawn
    again may have missed a change of either.
    """

    takes_stale_updates = False

    def uploads(self, round_num: int, name: str) -> bool:
        """B in rounds 0, 2, ..., A in rounds 1, 3, ..."""
        return not (factors.is_a(name) if round_num % 2 == 0 else factors.is_b(name))

    def downloads(self, name: str) -> bool:
        """Both."""
        return True
