"""A model's score on a set of samples."""

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
from fedmllm.types import Metrics, Prediction, Sample

Baseline = Literal["zero_shot", "local", "centralized", "fine_tuned", "calibrated_local", "calibrated_centralized"]


class EvaluationConfig(BaseModel):
    """When to evaluate, and against what."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    every: int = Field(5, ge=0)
    """Rounds between scores of the global model on the validation part, the last round's among them; 0 for none. The test split is asked at the end only."""
    baselines: tuple[Baseline, ...] = ("zero_shot", "local", "centralized")
    """What to compare with: the untrained model, each client alone, all data in one place, the final model trained on by each client; each client
    alone and all data in one place with ``label_calibration``, at the method's strength or 1."""
    tested: tuple[str, ...] = ()
    """Copies of the test split that the final model is also asked, e.g. ``[image, text, blur-1]``; the complete one always is."""
    client_samples: int = Field(0, ge=0)
    """Test samples of each client's own kind (its labels and modalities) that its models are also asked; 0 for none."""
    max_new_tokens: int = Field(16, gt=0)
    """Longest free answer in tokens."""
    batch_size: int = Field(50, gt=0)
    """Samples asked at a time."""

    @field_validator("tested")
    @classmethod
    def _named(cls, specs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(map(check_copy, specs)))


def predict(
    vlm: VisionLanguageModel, samples: Sequence[Sample], encode: Callable[[Sample], Encoded], config: EvaluationConfig
) -> list[Prediction]:
    """One prediction per sample, in their order. Prompts of like length share a batch."""
    vlm.model.eval()
    encoded = [encode(sample) for sample in samples]
    answers: dict[int, Prediction] = {}
    for group in _groups(samples, encoded, config.batch_size):
        asked, tensors = [samples[i] for i in group], [encoded[i] for i in group]
        got = choose(vlm, asked, tensors) if asked[0].options else generate(vlm, asked, tensors, config.max_new_tokens)
        answers.update(zip(group, got, strict=True))
    return [answers[i] for i in range(len(samples))]


def _groups(samples: Sequence[Sample], encoded: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    """Batches of indices: multiple choice apart from free answers, each sorted by length."""
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
    """Scores of the model as it stands; see ``all_metrics``. What they are computed from is appended to ``kept``."""
    predictions = predict(vlm, samples, encode, config)
    if kept is not None:
        kept.append(answered(metric, predictions))
    return all_metrics(metric, predictions, seed)
