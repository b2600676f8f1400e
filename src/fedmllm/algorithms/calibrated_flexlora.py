"""FlexLoRA's mean of products with clients calibrated to their own labels. Our own composition."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.checks import require_not_negative
from fedmllm.algorithms.flexlora import FlexLoRA
from fedmllm.algorithms.state import Client
from fedmllm.algorithms.strategies.label_calibration import LabelCalibration
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast


@dataclass(frozen=True)
class CalibratedFlexLoRA(FlexLoRA):
    """FlexLoRA with the strategy ``label_calibration``.

    The server averages the products of the clients' factors and not the factors themselves, so that clients with different directions or
    ranks do not cancel each other. Calibration keeps a client's label skew out of its update. Updates are as large as FedAvg's, and the
    server holds the updates of one cohort in memory. ``calibration = 0`` is FlexLoRA.

    Attributes:
        calibration: strength of ``label_calibration``. Questions without options are trained without calibration.
    """

    calibration: float = 1.0

    def __post_init__(self) -> None:
        require_not_negative(calibration=self.calibration)

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Return FlexLoRA's rule with calibration."""
        return LabelCalibration(self.calibration).rule(super().local_rule(broadcast, client), broadcast, client)
