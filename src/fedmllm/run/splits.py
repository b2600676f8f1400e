"""Splits that score models in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedmllm.config import Experiment
from fedmllm.engine.base import Scorer, Split
from fedmllm.evaluation.evaluate import evaluate
from fedmllm.evaluation.predictions import Answered
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import write_base, write_weights
from fedmllm.training.batches import Encoder
from fedmllm.types import Metrics, Sample, Weights


@dataclass(frozen=True)
class Splits:
    """Makes splits that score models with one model and encoder.

    Attributes:
        vlm: the model into which weights are written to score them.
        encoder: encodes the samples.
        experiment: the run's settings.
        metric: the headline metric.
    """

    vlm: VisionLanguageModel
    encoder: Encoder
    experiment: Experiment
    metric: str

    def split(self, samples: Sequence[Sample], name: str = "", kept: list[Answered] | None = None) -> Split:
        """Return a split that scores models by the experiment's metric. ``kept`` collects the answers."""
        return Split(self.scorer(samples, self.metric, kept), name, self.metric)

    def scorer(self, samples: Sequence[Sample], metric: str, kept: list[Answered] | None = None) -> Scorer:
        """Return a function that scores weights, with the change merged into the frozen weights, on some samples."""

        def score(weights: Weights, base: Weights) -> Metrics:
            write_base(self.vlm, base)
            write_weights(self.vlm.model, weights)
            return evaluate(self.vlm, samples, self.encoder, metric, self.experiment.evaluation, self.experiment.seed, kept)

        return score
