"""What we recommend to begin with: FlexLoRA's mean of products, and clients calibrated to their own labels. Our own composition."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.base import Client, require_not_negative
from fedmllm.algorithms.flexlora import FlexLoRA
from fedmllm.algorithms.strategies.label_calibration import LabelCalibration
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast


@dataclass(frozen=True)
class FedMLLM(FlexLoRA):
    """FlexLoRA with the strategy ``label_calibration``.

    The mean is taken of what clients' adapters do, their products, not of the factors, so that clients that went different ways, or have
    different ranks, do not cancel. Calibration keeps what a client's skew explains out of its update. Nothing else is to be tuned, and
    updates have the size of FedAvg's; the server holds those of one cohort. ``calibration = 0`` is FlexLoRA. ``FedMLLM(method)``, the
    published pair of strategies on a method, is another thing.

    Attributes:
        calibration: the strength of ``label_calibration``; questions without options are trained plainly.
    """

    kind = "recommended"
    calibration: float = 1.0

    def __post_init__(self) -> None:
        require_not_negative(calibration=self.calibration)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """FlexLoRA's with calibration."""
        return LabelCalibration(self.calibration).rule(super().local_rule(broadcast, client), broadcast, client)
