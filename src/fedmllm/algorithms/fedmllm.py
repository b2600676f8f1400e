"""What we recommend to begin with: FedAvg with light momentum and clients calibrated to their own labels. Our own composition."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.base import Client, require_not_negative
from fedmllm.algorithms.fedavgm import FedAvgM
from fedmllm.algorithms.strategies.label_calibration import LabelCalibration
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast


@dataclass(frozen=True)
class FedMLLM(FedAvgM):
    """FedAvgM at ``beta1 = 0.5`` and rate 1, with the strategy ``label_calibration``.

    Momentum carries over what a cohort has learnt to the next, whose clients may hold other modalities and labels, and doubles
    the way that steady progress makes. Calibration keeps what a client's skew explains out of its update. Updates stream and have
    the size of FedAvg's. ``beta1 = 0`` and ``calibration = 0`` is FedAvg. ``FedMLLM(method)``, the published pair of strategies on a
    method, is another thing.

    Attributes:
        beta1: how much of the momentum stays, in [0, 1).
        calibration: the strength of ``label_calibration``; questions without options are trained plainly.
    """

    kind = "recommended"
    beta1: float = 0.5
    calibration: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(calibration=self.calibration)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """FedAvg's with calibration."""
        return LabelCalibration(self.calibration).rule(super().local_rule(broadcast, client), broadcast, client)
