"""Communication-Efficient Learning of Deep Networks from Decentralized Data. McMahan et al., AISTATS 2017."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.base import ServerAverage


@dataclass(frozen=True)
class FedAvg(ServerAverage):
    """``w <- w + sum_k p_k (w_k - w)`` with ``p_k = n_k / sum n`` over the cohort; clients train plainly.

    Averaging LoRA's factors one by one is not averaging their products: for that see the methods marked exact.
    Flower's FedAvg is the same rule.
    """
