"""Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Yin et al., ICML 2018: coordinate-wise trimmed mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fedmllm.algorithms.checks import require_within
from fedmllm.algorithms.median import Median


@dataclass(frozen=True)
class TrimmedMean(Median):
    """Drops the largest and smallest values in every coordinate and averages the rest with uniform weights.

        w <- w + mean of the K - 2 floor(trim K) middle values of D_k

    ``trim = 0`` is the uniform mean. Otherwise a round needs enough clients to drop at least one at each end, e.g. 5 for ``trim = 0.2``.
    Flower's ``FedTrimmedAvg`` trims the clients' weights instead of their updates, which gives the same result, and also averages the
    rest with uniform weights.

    Attributes:
        trim: share of the clients dropped at each end, in [0, 0.5).
    """

    trim: float = 0.2

    def __post_init__(self) -> None:
        require_within("trim", self.trim, 0, 0.5)

    @property
    def smallest_cohort(self) -> int:
        """The smallest K with ``trim K >= 1``; 1 without trimming."""
        # No cohort is larger than 2^40. Rounding in 1 / trim may give a K that is one too small.
        least = math.ceil(1 / max(self.trim, 2.0**-40))
        return least + (self.trim * least < 1) if self.trim else 1

    def middle(self, updates: Tensor) -> Tensor:
        """Return the trimmed mean over clients, the first axis."""
        ordered, cut = updates.sort(dim=0).values, int(self.trim * len(updates))
        return ordered[cut : len(updates) - cut].mean(dim=0)
