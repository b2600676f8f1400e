"""Adaptive Federated Optimization. Reddi et al., ICLR 2021: the Adam server."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedmllm.algorithms.checks import require_within
from fedmllm.algorithms.fedadagrad import FedAdagrad


@dataclass(frozen=True)
class FedAdam(FedAdagrad):
    """FedAdagrad with momentum (beta1 = 0.9) and ``second(v, s) = beta2 v + (1 - beta2) s``.

    Flower's ``FedAdam`` weights D by sample counts, starts at v_0 = 0, and multiplies the rate of round t = 1, 2, ... by a bias
    correction whose exponent is one too large: ``sqrt(1 - beta2^(t + 1)) / (1 - beta1^(t + 1))``.

    Attributes:
        beta1: decay of the momentum, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
    """

    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        self._require_ranges()
        require_within("beta2", self.beta2, 0, 1)

    def second(self, previous: Tensor, square: Tensor) -> Tensor:
        """Return the next second moment, given the previous one and this round's square."""
        return self.beta2 * previous + (1 - self.beta2) * square
