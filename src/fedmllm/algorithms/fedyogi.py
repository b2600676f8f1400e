"""Adaptive Federated Optimization. Reddi et al., ICLR 2021: the Yogi server."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmllm.algorithms.fedadam import FedAdam


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """FedAdam with ``second(v, s) = v - (1 - beta2) s sign(v - s)``.

    Flower's ``FedYogi`` weights D by sample counts and starts at v_0 = 0; otherwise it is the same rule.
    """

    def second(self, previous: Tensor, square: Tensor) -> Tensor:
        """Return the next second moment, given the previous one and this round's square."""
        return previous - (1 - self.beta2) * square * (previous - square).sign()
