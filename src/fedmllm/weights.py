"""Arithmetic on ``Weights``: named tensors that always travel and change together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmllm.errors import FederationError
from fedmllm.types import Weights


def zeros_like(weights: Weights, dtype: torch.dtype | None = None) -> Weights:
    """Tensors of the same names and shapes, all zero; of the same dtype for None."""
    return {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in weights.items()}


def add(a: Weights, b: Mapping[str, Tensor], scale: float = 1.0) -> Weights:
    """``a + scale * b``, summed in float64 and rounded once to the dtype of ``a``; what ``b`` does not name stays as it is."""
    return {n: torch.add(t.double(), b[n], alpha=scale).to(t.dtype) if n in b else t for n, t in a.items()}


def subtract(a: Weights, b: Weights) -> Weights:
    """``a - b``."""
    return {name: tensor - b[name] for name, tensor in a.items()}


def norm(weights: Weights) -> float:
    """Euclidean norm over all tensors together."""
    return float(torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in weights.values()]).norm())


def is_finite(weights: Weights) -> bool:
    """Whether no entry is infinite or NaN."""
    # A sum is finite only if all entries are, and takes a tenth of the time; that of large entries may be infinite without.
    return all(bool(tensor.sum().isfinite()) or bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def num_bytes(*groups: Mapping[str, Tensor]) -> int:
    """Size of the tensors as sent, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for weights in groups for tensor in weights.values())


class WeightedMean:
    """A mean that takes its terms one at a time, so that memory does not grow with the cohort.

        mean = sum_k weight_k * term_k / sum_k weight_k

    summed in float64. The order of the terms is the caller's to fix: floating-point sums depend on it.
    """

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, term: Weights, weight: float) -> None:
        """Add a term.

        Raises:
            FederationError: if the weight is negative.
        """
        if weight < 0:
            raise FederationError(f"a weight in an average must not be negative, got {weight}")
        for name, tensor in term.items():
            if name not in self._sum:
                self._sum[name] = torch.zeros_like(tensor, dtype=torch.float64)
            self._sum[name].add_(tensor, alpha=weight)
        self._weight += weight

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return num_bytes(self._sum)

    def value(self) -> Weights:
        """The mean in float64.

        Raises:
            FederationError: if there was no term of positive weight.
        """
        if self._weight <= 0:
            raise FederationError("no update has a positive weight, so there is no average; check that the cohort's clients hold samples")
        return {name: total / self._weight for name, total in self._sum.items()}
