"""Compares free answers with the correct ones."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from statistics import mean

from fedmllm.types import Metrics, Prediction

SIGNS = "#&*/@\\\u2032\u2033"
"""Characters in Unicode's punctuation categories that carry meaning at the end of a word: ``C#``, ``A*``, minutes and seconds."""
_PUNCTUATION = ("Po", "Ps", "Pe", "Pi", "Pf")
_EMPHASIS = re.compile(r"(?<!\w)([*_`]+)(?=\S)(.+?)(?<=\S)\1(?!\w)")
_DECIMAL = re.compile(r"[.,]\d")
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Chinese and Japanese characters, which are written without spaces between words."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_YES_OR_NO = re.compile(r"\W*(yes|no)(?![\w/'\u2019-])(?!\s*(?:/|or|and)\s*(?:yes|no)\b)")
LONG = 8
"""An answer with more words than this is long."""


def is_right(prediction: Prediction) -> bool:
    """Return whether an answer is correct. A failure is wrong.

    For a sample with options, the chosen option must be the correct one; options are not compared as text. For a closed question whose
    correct answer is yes or no, the answer must begin with it. All other answers must match exactly after ``normalize``.
    """
    sample = prediction.sample
    if prediction.answer is None or sample.options:
        return prediction.answer == sample.answer
    if _asks_yes_or_no(prediction):
        return yes_or_no(prediction.answer) == normalize(sample.answer)
    return normalize(prediction.answer) == normalize(sample.answer)


def is_failure(prediction: Prediction) -> bool:
    """Return whether an answer could not be parsed: it is missing, or it begins with neither yes nor no although one of them is required."""
    return prediction.answer is None or (_asks_yes_or_no(prediction) and yes_or_no(prediction.answer) is None)


def _asks_yes_or_no(prediction: Prediction) -> bool:
    return prediction.sample.answer_type == "closed" and normalize(prediction.sample.answer) in ("yes", "no")


def yes_or_no(answer: str) -> str | None:
    """Return ``yes`` or ``no`` if it is the answer's first word (``"Yes, it is."``); None otherwise, and for ``"yes or no"``."""
    found = _YES_OR_NO.match(normalize(answer))
    return found[1] if found else None


def free_scores(predictions: Sequence[Prediction]) -> Metrics:
    """Return scores of free answers as means over samples. A failure scores 0.

    - ``accuracy_TYPE``: the share of correct answers (``is_right``) by answer type.
    - ``recall_open = m / t`` and ``f1_open = 2 m / (t + a)`` for open questions, where m is the number of words that both answers share, t
      that of the correct answer and a that of the model's answer, as bags of ``words`` (Rajpurkar et al., EMNLP 2016).
    - ``rouge_l_long`` for open questions whose correct answer has more than ``LONG`` words: the same F1 with the length of the longest
      common subsequence as m (ROUGE-L; Lin, 2004).
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
    """Return the harmonic mean of ``shared / len(right)`` and ``shared / len(given)``."""
    return 2 * shared / (len(right) + len(given))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = lengths
        lengths = [0]
        for i, second in enumerate(other):
            lengths.append(before[i] + 1 if word == second else max(before[i + 1], lengths[i]))
    return lengths[-1]


def words(answer: str) -> list[str]:
    """Return the words of an answer after ``normalize``. In scripts without spaces, each character is a word."""
    text = normalize(answer)
    return [*filter(None, map(_bare, _WORD.findall(text)))] or text.split()


def normalize(answer: str) -> str:
    """Normalize an answer: fold case, convert to the Unicode form NFC, use single spaces, and remove emphasis and outer punctuation.

    ``"Yes."`` becomes ``"yes"``, ``"是。"`` becomes ``"是"``, and ``"**yes**"`` becomes ``"yes"``. Punctuation at both ends of words is
    removed in any script: brackets, quotation marks and the Unicode category Po without ``SIGNS``. Symbols and dashes stay (``"<5"``,
    ``"-1"``, ``"C++"``), and so does everything inside a word (``"x-ray"``). An answer that consists only of punctuation keeps it.
    """
    while (plain := _plainer(answer)) != answer:
        answer = plain
    return answer


def _plainer(answer: str) -> str:
    """Apply one step of ``normalize``. Steps repeat because a removal can join emphasis marks, or a letter and its accent."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", answer).casefold())
    words = _EMPHASIS.sub(r"\2", folded).split()
    return " ".join(filter(None, map(_bare, words))) or " ".join(words)


def _bare(word: str) -> str:
    """Return a word without the punctuation at its ends. A decimal point before a digit is not punctuation."""
    start, end = 0, len(word)
    while end and _is_punctuation(word[end - 1]):
        end -= 1
    while start < end and _is_punctuation(word[start]) and not _DECIMAL.match(word, start):
        start += 1
    return word[start:end]


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character) in _PUNCTUATION and character not in SIGNS
