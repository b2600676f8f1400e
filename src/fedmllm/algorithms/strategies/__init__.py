"""The index of strategies, by the names used in ``algorithm.strategies``. Each strategy has its own file and composes with any method."""

from __future__ import annotations

from typing import Any

from fedmllm.algorithms.strategies.adaptive_regularization import AdaptiveRegularization
from fedmllm.algorithms.strategies.agnostic_prompt import AgnosticPrompt
from fedmllm.algorithms.strategies.base import Composed, Holdings, Remark, Strategy
from fedmllm.algorithms.strategies.feature_alignment import FeatureAlignment
from fedmllm.algorithms.strategies.label_calibration import LabelCalibration
from fedmllm.algorithms.strategies.modality_coverage import ModalityCoverage
from fedmllm.registry import index

__all__ = ["STRATEGIES", "Composed", "Holdings", "Remark", "Strategy"]

STRATEGIES: dict[str, type[Any]] = index(
    "strategy",
    {
        "adaptive_regularization": AdaptiveRegularization,
        "agnostic_prompt": AgnosticPrompt,
        "feature_alignment": FeatureAlignment,
        "label_calibration": LabelCalibration,
        "modality_coverage": ModalityCoverage,
    },
)
