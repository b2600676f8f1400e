"""Free answers against the right ones."""

from __future__ import annotations

import re
import unicodedata

from fedmllm.types import Prediction

SIGNS = "#&*/@\\\u2032\u2033"
"""Punctuation by its category in Unicode that carries meaning at the end of a word: ``C#``, ``A*``, minutes and seconds."""
_PUNCTUATION = ("Po", "Ps", "Pe", "Pi", "Pf")
_EMPHASIS = re.compile(r"(?<!\w)([*_`]+)(?=\S)(.+?)(?<=\S)\1(?!\w)")
_DECIMAL = re.compile(r"[.,]\d")


def is_right(prediction: Prediction) -> bool:
    """Whether an answer is right; a failure is wrong.

    Of a sample with options, whether the right one was chosen: options are not read as text. Else exact match after ``normalize``.
    """
    sample = prediction.sample
    if prediction.answer is None or sample.options:
        return prediction.answer == sample.answer
    return normalize(prediction.answer) == normalize(sample.answer)


def normalize(answer: str) -> str:
    """Case folded, in Unicode's form NFC, single spaces, no emphasis (``**yes**``), no punctuation at the ends of words.

    ``"Yes."`` equals ``"yes"``, ``"是。"`` equals ``"是"``. Punctuation is what Unicode says, in any script: brackets, quotation marks
    and the category Po without ``SIGNS``, so that symbols and dashes stay (``"<5"``, ``"-1"``, ``"C++"``), as all inside of a word does
    (``"x-ray"``). An answer of punctuation alone stays as it is.
    """
    while (plain := _plainer(answer)) != answer:
        answer = plain
    return answer


def _plainer(answer: str) -> str:
    """One step: what it takes away can bring marks of emphasis, or a letter and its accent, together."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", answer).casefold())
    words = _EMPHASIS.sub(r"\2", folded).split()
    return " ".join(filter(None, map(_bare, words))) or " ".join(words)


def _bare(word: str) -> str:
    """A word without the punctuation at its ends. A decimal point before a digit is none."""
    start, end = 0, len(word)
    while end and _is_punctuation(word[end - 1]):
        end -= 1
    while start < end and _is_punctuation(word[start]) and not _DECIMAL.match(word, start):
        start += 1
    return word[start:end]


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character) in _PUNCTUATION and character not in SIGNS
