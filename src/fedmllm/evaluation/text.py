"""Free answers against the right ones."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from statistics import mean

from fedmllm.types import Metrics, Prediction

SIGNS = "#&*/@\\\u2032\u2033"
"""Punctuation by its category in Unicode that carries meaning at the end of a word: ``C#``, ``A*``, minutes and seconds."""
_PUNCTUATION = ("Po", "Ps", "Pe", "Pi", "Pf")
_EMPHASIS = re.compile(r"(?<!\w)([*_`]+)(?=\S)(.+?)(?<=\S)\1(?!\w)")
_DECIMAL = re.compile(r"[.,]\d")
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Chinese and Japanese characters, which no spaces divide into words."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_YES_OR_NO = re.compile(r"\W*(yes|no)(?![\w/'\u2019-])(?!\s*(?:/|or|and)\s*(?:yes|no)\b)")
LONG = 8
"""Words; an answer of more is long."""


def is_right(prediction: Prediction) -> bool:
    """Whether an answer is right; a failure is wrong.

    Of a sample with options, whether the right one was chosen: options are not read as text. Of a closed question that is answered by
    yes or no, whether the answer begins with the right one. Else exact match after ``normalize``.
    """
    sample = prediction.sample
    if prediction.answer is None or sample.options:
        return prediction.answer == sample.answer
    if _asks_yes_or_no(prediction):
        return yes_or_no(prediction.answer) == normalize(sample.answer)
    return normalize(prediction.answer) == normalize(sample.answer)


def is_failure(prediction: Prediction) -> bool:
    """Whether an answer could not be read: there is none, or yes or no is asked for and it begins with neither."""
    return prediction.answer is None or (_asks_yes_or_no(prediction) and yes_or_no(prediction.answer) is None)


def _asks_yes_or_no(prediction: Prediction) -> bool:
    return prediction.sample.answer_type == "closed" and normalize(prediction.sample.answer) in ("yes", "no")


def yes_or_no(answer: str) -> str | None:
    """``yes`` or ``no`` if that is the answer's first word (``"Yes, it is."``); None else, and for both at once (``"yes or no"``)."""
    found = _YES_OR_NO.match(normalize(answer))
    return found[1] if found else None


def free_scores(predictions: Sequence[Prediction]) -> Metrics:
    """Scores of free answers by kind, as means over samples; a failure scores 0.

    ``accuracy_KIND``: ``is_right``. Of open questions, with the words of ``normalize`` as bags, m words shared, t in the right answer and
    a in the model's: ``recall_open = m / t``, ``f1_open = 2 m / (t + a)`` (Rajpurkar et al., EMNLP 2016). ``rouge_l_long``, where right answers
    of open questions have more than ``LONG`` words: the same F1 with m the longest common subsequence (ROUGE-L; Lin, 2004).
    """
    scores: Metrics = {}
    for kind in sorted({p.sample.answer_type for p in predictions} - {"choice"}):
        scores[f"accuracy_{kind}"] = mean(float(is_right(p)) for p in predictions if p.sample.answer_type == kind)
    pairs = [(words(p.sample.answer), words(p.answer or "")) for p in predictions if p.sample.answer_type == "open"]
    shared = [(Counter(right) & Counter(given)).total() for right, given in pairs]
    if pairs:
        scores["recall_open"] = mean(m / len(right) for m, (right, _) in zip(shared, pairs, strict=True))
        scores["f1_open"] = mean(_f1(m, *pair) for m, pair in zip(shared, pairs, strict=True))
    if long := [(right, given) for right, given in pairs if len(right) > LONG]:
        scores["rouge_l_long"] = mean(_f1(_common(*pair), *pair) for pair in long)
    return scores


def _f1(shared: int, right: Sequence[str], given: Sequence[str]) -> float:
    """The harmonic mean of ``shared / len(right)`` and ``shared / len(given)``."""
    return 2 * shared / (len(right) + len(given))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = lengths
        lengths = [0]
        for i, second in enumerate(other):
            lengths.append(before[i] + 1 if word == second else max(before[i + 1], lengths[i]))
    return lengths[-1]


def words(answer: str) -> list[str]:
    """The words of an answer after ``normalize``; of a script that is written without spaces, each character."""
    text = normalize(answer)
    return [*filter(None, map(_bare, _WORD.findall(text)))] or text.split()


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
