"""Communication-Efficient Learning of Deep Networks from Decentralized Data. McMahan et al., AISTATS 2017."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.base import ServerAverage


@dataclass(frozen=True)
class FedAvg(ServerAverage):
    """``w <- w + sum_k p_k (w_k - w)`` with ``p_k = n_k / sum n`` over the cohort. Clients minimize the loss without further terms.

    Averaging LoRA's factors separately does not average their products; the methods marked exact do. Flower's FedAvg is the same rule.
    """
