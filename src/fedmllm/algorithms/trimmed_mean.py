"""Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Yin et al., ICML 2018: coordinate-wise trimmed mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fedmllm.algorithms.base import require_within
from fedmllm.algorithms.median import Median


@dataclass(frozen=True)
class TrimmedMean(Median):
    """In every coordinate the largest and the smallest updates are left out, and the others averaged; clients count alike.

        w <- w + mean of the K - 2 floor(trim K) middle values of D_k

    ``trim = 0`` is the plain mean; with another a round needs as many clients as leave one out at each end, 5 for ``trim = 0.2``.
    Flower's ``FedTrimmedAvg`` trims the clients' weights instead of their updates, which is the same, and weighs those left alike.

    Attributes:
        trim: share of the clients left out at each end, in [0, 0.5).
    """

    trim: float = 0.2

    def __post_init__(self) -> None:
        require_within("trim", self.trim, 0, 0.5)

    @property
    def smallest_cohort(self) -> int:
        """The least K with ``trim K >= 1``; 1 without trimming."""
        # No cohort is larger than 2^40, and 1 / trim may round down.
        least = math.ceil(1 / max(self.trim, 2.0**-40))
        return least + (self.trim * least < 1) if self.trim else 1

    def middle(self, updates: Tensor) -> Tensor:
        """The trimmed mean along the first axis."""
        ordered, cut = updates.sort(dim=0).values, int(self.trim * len(updates))
        return ordered[cut : len(updates) - cut].mean(dim=0)
