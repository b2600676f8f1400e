"""Adaptive Federated Optimization. Reddi et al., ICLR 2021: the Adagrad server."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmllm.algorithms.base import AdaptiveServer


@dataclass(frozen=True)
class FedAdagrad(AdaptiveServer):
    """``AdaptiveServer`` with ``second(v, s) = v + s``."""

    def second(self, previous: Tensor, square: Tensor) -> Tensor:
        """The next second moment."""
        return previous + square
