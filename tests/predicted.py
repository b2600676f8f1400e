"""Predictions written by hand: of two options, of several, and free answers."""

from __future__ import annotations

from collections.abc import Sequence

from fedmllm.types import AnswerType, Prediction, Sample


def binary(label: int, probability: float | None) -> Prediction:
    sample = Sample("s", "q", ("no", "yes")[label], {"text": "t"}, options=("no", "yes"))
    if probability is None:
        return Prediction(sample, None)
    return Prediction(sample, "yes" if probability > 0.5 else "no", (1 - probability, probability))


def multi(label: str, guess: str | None, options: Sequence[str] = ("a", "b", "c")) -> Prediction:
    return Prediction(Sample("s", "q", label, {"text": "t"}, options=tuple(options)), guess)


def free(answer: str, guess: str | None, kind: AnswerType = "open") -> Prediction:
    return Prediction(Sample("s", "q", answer, {"text": "t"}, answer_type=kind), guess)
