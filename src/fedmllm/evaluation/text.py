"""Free answers against the right ones."""

from __future__ import annotations

import string

from fedmllm.types import Prediction


def is_right(prediction: Prediction) -> bool:
    """Exact match after ``normalize``; a failure is wrong."""
    return prediction.answer is not None and normalize(prediction.answer) == normalize(prediction.sample.answer)


def normalize(answer: str) -> str:
    """Lower case, single spaces, no punctuation at the ends of words: ``"Yes."`` equals ``"yes"``, ``"x-ray"`` stays."""
    words = (word.strip(string.punctuation) for word in answer.lower().split())
    return " ".join(word for word in words if word)
