"""Towards Building the Federated GPT: Federated Instruction Tuning. Zhang et al., ICASSP 2024 (FedIT)."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.fedavg import FedAvg


@dataclass(frozen=True)
class FedIT(FedAvg):
    """FedAvg of LoRA's factors, ``A <- sum_k p_k A_k`` and ``B <- sum_k p_k B_k``. With adapters it is identical to ``fedavg``.

    The product of the means is not the mean of the products. The method has its own name because papers compare against it.
    """

    kind = "lora"
