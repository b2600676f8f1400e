"""Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Yin et al., ICML 2018: coordinate-wise median."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmllm.algorithms.trimmed_mean import TrimmedMean


@dataclass(frozen=True)
class Median(TrimmedMean):
    """``w <- w + median_k D_k`` in every coordinate; of an even number of clients the mean of the two in the middle.

    It is the trimmed mean that leaves out all it can. Flower's ``FedMedian`` takes the median of the weights, which is the same.
    """

    def middle(self, updates: Tensor) -> Tensor:
        """The median along the first axis."""
        ordered, half = updates.sort(dim=0).values, len(updates) // 2
        return (ordered[(len(updates) - 1) // 2] + ordered[half]) / 2
