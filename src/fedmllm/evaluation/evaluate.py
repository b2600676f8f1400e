"""Evaluates a model on a set of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedmllm.data.test_copies import check_copy
from fedmllm.evaluation.answers import choose, generate
from fedmllm.evaluation.metrics import all_metrics
from fedmllm.evaluation.predictions import Answered, answered
from fedmllm.models.encoding import Encoded
from fedmllm.models.load import VisionLanguageModel
from fedmllm.settings_file import ADVANCED
from fedmllm.types import Metrics, Prediction, Sample

Baseline = Literal["zero_shot", "local", "centralized", "fine_tuned", "calibrated_local", "calibrated_centralized"]


class EvaluationConfig(BaseModel):
    """When the model is evaluated, on which samples, and which baselines it is compared with."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every: int = Field(5, ge=0)
    """Number of rounds between evaluations of the global model on the validation split; the last round is always included. 0 disables them.
    The test split is used only at the end."""
    baselines: tuple[Baseline, ...] = ("zero_shot", "local", "centralized")
    """Baselines to compare with: ``zero_shot`` is the untrained model; ``local`` trains on each client alone; ``centralized`` trains on all data
    in one place; ``fine_tuned`` continues training the final model on each client; ``calibrated_local`` and ``calibrated_centralized`` add
    ``label_calibration``, with the method's strength or 1."""
    tested: tuple[str, ...] = ()
    """Copies of the test split with missing modalities or corruptions, e.g. ``[image, text, blur-1]``, on which the final model is evaluated in
    addition to the complete test split."""
    client_samples: int = Field(0, ge=0)
    """Number of test samples drawn for each client with its own labels and modalities, on which its models are also evaluated; 0 for none."""
    max_new_tokens: int = Field(16, gt=0)
    """Maximum length of free answers in tokens."""
    batch_size: int = Field(50, gt=0, json_schema_extra=ADVANCED)
    """Number of samples per batch in evaluation."""

    @field_validator("tested")
    @classmethod
    def _named(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(map(check_copy, specs)))


def predict(
    vlm: VisionLanguageModel, samples: Sequence[Sample], encode: Callable[[Sample], Encoded], config: EvaluationConfig
) -> list[Prediction]:
    """Return one prediction for each sample, in the same order. Prompts of similar length share a batch."""
    vlm.model.eval()
    encoded = [encode(sample) for sample in samples]
    answers: dict[int, Prediction] = {}
    for group in _groups(samples, encoded, config.batch_size):
        asked, tensors = [samples[i] for i in group], [encoded[i] for i in group]
        got = choose(vlm, asked, tensors) if asked[0].options else generate(vlm, asked, tensors, config.max_new_tokens)
        answers.update(zip(group, got, strict=True))
    return [answers[i] for i in range(len(samples))]


def _groups(samples: Sequence[Sample], encoded: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    """Yield batches of positions, separately for multiple choice and free answers, each sorted by length."""
    for with_options in (True, False):
        chosen = [i for i, sample in enumerate(samples) if bool(sample.options) == with_options]
        chosen.sort(key=lambda i: (len(encoded[i].prompt_ids), i))
        yield from (chosen[k : k + size] for k in range(0, len(chosen), size))


def evaluate(
    vlm: VisionLanguageModel,
    samples: Sequence[Sample],
    encode: Callable[[Sample], Encoded],
    metric: str,
    config: EvaluationConfig,
    seed: int,
    kept: list[Answered] | None = None,
) -> Metrics:
    """Return the model's scores on the samples; see ``all_metrics``.

    Args:
        vlm: the model.
        samples: the samples.
        encode: encodes a sample.
        metric: the headline score.
        config: the evaluation settings.
        seed: the seed of the bootstrap.
        kept: a list to which the predictions are appended as numbers, or None.
    """
    predictions = predict(vlm, samples, encode, config)
    if kept is not None:
        kept.append(answered(metric, predictions))
    return all_metrics(metric, predictions, seed)
