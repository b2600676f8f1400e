"""Arithmetic on ``Weights``, a dictionary of named tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmllm.errors import FederationError
from fedmllm.types import Weights


def zeros_like(weights: Weights, dtype: torch.dtype | None = None) -> Weights:
    """Return zeros with the same names and shapes, and with the same dtypes if ``dtype`` is None."""
    return {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in weights.items()}


def add(a: Weights, b: Mapping[str, Tensor], scale: float = 1.0) -> Weights:
    """Return ``a + scale * b``, summed in float64 and rounded once to the dtype of ``a``. Tensors missing from ``b`` are not changed."""
    return {n: torch.add(t.double(), b[n], alpha=scale).to(t.dtype) if n in b else t for n, t in a.items()}


def subtract(a: Weights, b: Weights) -> Weights:
    """Return ``a - b``, tensor by tensor."""
    return {name: tensor - b[name] for name, tensor in a.items()}


def norm(weights: Weights) -> float:
    """Return the Euclidean norm over all entries of all tensors."""
    return float(torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in weights.values()]).norm())


def is_finite(weights: Weights) -> bool:
    """Return whether no entry is infinite or NaN."""
    # A finite sum proves that all entries are finite and takes a tenth of the time. The sum of large finite entries may still overflow.
    return all(bool(tensor.sum().isfinite()) or bool(torch.isfinite(tensor).all()) for tensor in weights.values())


def num_bytes(*groups: Mapping[str, Tensor]) -> int:
    """Return the total size of the tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for weights in groups for tensor in weights.values())


class WeightedMean:
    """A streaming weighted mean in float64, whose memory does not grow with the number of terms.

        mean = sum_k weight_k * term_k / sum_k weight_k

    Floating-point sums depend on the order of their terms, so callers must add them in a fixed order.
    """

    def __init__(self) -> None:
        self._sum: dict[str, Tensor] = {}
        self._weight = 0.0

    def add(self, term: Weights, weight: float) -> None:
        """Add a term to the mean, with its weight.

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
        """Memory used by the running sum, in bytes."""
        return num_bytes(self._sum)

    @property
    def total(self) -> Weights:
        """The weighted sum of the terms so far, in float64; empty without terms."""
        return dict(self._sum)

    def value(self) -> Weights:
        """Return the mean in float64.

        Raises:
            FederationError: if no term had a positive weight.
        """
        if self._weight <= 0:
            raise FederationError("no update has a positive weight, so there is no average; check that the cohort's clients hold samples")
        return {name: total / self._weight for name, total in self._sum.items()}
