"""Free answers compared with the correct ones: near misses, normalization, yes or no, and overlaps of words."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.evaluation.metrics import all_metrics
from fedmllm.evaluation.text import free_scores, is_failure, is_right, normalize, words, yes_or_no
from fedmllm.types import AnswerType
from predicted import binary, free


@pytest.mark.parametrize(
    ("answer", "guess", "right"),
    [
        ("yes", "Yes.", True),
        ("X-ray", "x-ray", True),
        ("left lung", "  Left   lung", True),
        ("3", "3.", True),
        ("yes", "yes it is", False),
        ("no", "not", False),
        ("left lung", "lung", False),
        ("x-ray", "xray", False),
        ("yes", None, False),
        ("1", "10", False),
        ("5%", "5", True),
    ],
)
def test_near_misses_of_free_answers(answer: str, guess: str | None, right: bool) -> None:
    assert is_right(free(answer, guess)) is right


@pytest.mark.parametrize(
    ("answer", "guess", "right"),
    [
        ("+", "-", False),
        ("+", "+.", True),
        ("-", "-", True),
        ("-", "?", False),
        ("HER2 +", "HER2 -", False),
        ("Rh-", "Rh", False),
        ("<5", "5", False),
        ("<5", "< 5", False),
        ("<5", "<5.", True),
        ("≥5", ">5", False),
        ("-1", "1", False),
        ("-1", "(-1).", True),
        (".5", "5", False),
        (".5", "(.5)", True),
        ("C++", "C#", False),
        ("C++", "C", False),
        ("C#", "c#.", True),
        ("A*", "A", False),
        ("5\u2032", "5\u2033", False),
        ("37°", "37", False),
        ("yes", "**Yes**", True),
        ("left lung", "_Left lung_.", True),
        ("2*3*4", "234", False),
        ("snake_case", "snakecase", False),
        ("是", "是。", True),
        ("是", "「是」", True),
        ("是", "不是。", False),
        ("да", "«Да»!", True),
        ("نعم", "نعم؟", True),
        ("हाँ", "हाँ।", True),
        ("sí", "¡Sí!", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("café", "cafe", False),
        ("Straße", "STRASSE", True),
        ("...", "...", True),
        ("...", "?", False),
        ("yes", "...", False),
    ],
)
def test_normalizing_keeps_signs_and_drops_punctuation_of_any_script(answer: str, guess: str, right: bool) -> None:
    assert is_right(free(answer, guess)) is right


@given(st.text(st.characters(codec="utf-8") | st.sampled_from("*_` .,-+#(א。ßΣİé"), max_size=30))
def test_normalizing_never_gives_an_empty_answer(text: str) -> None:
    assert bool(normalize(text)) == bool(text.split())
    assert normalize(normalize(text)) == normalize(text)


@given(st.text())
def test_normalizing_is_idempotent(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize(
    ("guess", "read"),
    [
        ("Yes, it is.", "yes"),
        ("Yes. The left lung shows no fracture.", "yes"),
        ("**Yes**, there is", "yes"),
        ("Yes,it is", "yes"),
        ("Yes\u2014it is", "yes"),
        ("YES!", "yes"),
        ("No fracture is seen.", "no"),
        ("No, yes would be wrong", "no"),
        ("Not at all", None),
        ("None", None),
        ("Nothing", None),
        ("Normal", None),
        ("no-one", None),
        ("Yesterday", None),
        ("yes's", None),
        ("yes/no", None),
        ("Yes or no?", None),
        ("yes and no", None),
        ("yes / no", None),
        ("It is, yes", None),
        ("The answer is no", None),
        ("", None),
    ],
)
def test_a_closed_answer_is_read_by_its_first_word(guess: str, read: str | None) -> None:
    assert yes_or_no(guess) == read
    for truth in ("yes", "No."):
        prediction = free(truth, guess, "closed")
        assert is_right(prediction) is (read == normalize(truth))
        assert is_failure(prediction) is (read is None)
    assert is_right(free("yes", guess, "open")) is (normalize(guess) == "yes")


@pytest.mark.parametrize(
    ("answer", "guess", "kind", "right"),
    [
        ("left", "Left.", "closed", True),
        ("left", "left or right", "closed", False),
        ("left", "It is on the left", "closed", False),
        ("no change", "no", "closed", False),
        ("yes, both", "yes", "closed", False),
        ("12", "12 ribs", "closed", False),
        ("yes", "yes it is", "open", False),
    ],
)
def test_other_closed_and_open_answers_are_compared_whole(answer: str, guess: str, kind: AnswerType, right: bool) -> None:
    assert is_right(free(answer, guess, kind)) is right
    assert not is_failure(free(answer, guess, kind))


def test_a_polite_model_scores_like_a_terse_one_on_yes_or_no_questions() -> None:
    """A model that evades the question is counted as a failure, not as a class."""
    truths = ["yes", "no", "yes", "no"]
    terse, polite = (["yes", "no", "no", "no"], ["Yes, it is.", "No, there is none.", "No - it is not.", "No. That is normal."])
    scores = [
        all_metrics("accuracy", [free(t, g, "closed") for t, g in zip(truths, given_answers, strict=True)], 0)
        for given_answers in (terse, polite)
    ]
    assert scores[0] == scores[1]
    assert scores[0]["score"] == scores[0]["accuracy_closed"] == 0.75
    evasive = all_metrics("accuracy", [free(t, "I cannot say yes or no.", "closed") for t in truths], 0)
    assert (evasive["score"], evasive["failures"]) == (0, 4)


def test_open_scores_match_a_hand_computation() -> None:
    """Right answer 3 words, model's answer 6, 3 shared: recall 1, F1 2 * 3 / 9. Then 1 of 2 shared with 1: recall 1/2, F1 2 / 3. Then a failure."""
    rows = [free("left lower lobe", "It is the left lower lobe."), free("chest CT", "CT"), free("liver", None)]
    scores = free_scores(rows)
    assert scores == pytest.approx({"accuracy_open": 0, "recall_open": (1 + 1 / 2) / 3, "f1_open": (2 / 3 + 2 / 3) / 3})
    assert free_scores([free("lung", "Lung.")]) == {"accuracy_open": 1, "recall_open": 1, "f1_open": 1}
    assert free_scores([free("lung", "lungs")])["recall_open"] == 0
    assert free_scores([free("the the", "the")])["recall_open"] == 0.5
    assert free_scores([free("yes", "yes", "closed")]) == {"accuracy_closed": 1}
    assert free_scores([binary(0, 0.1)]) == {}


def test_long_answer_scores_match_a_hand_computation() -> None:
    """Of 9 words in the order a to i, the model's 6 share b d e in order: F1 2 * 3 / 15. Bags of words share 6. 8 words are not long."""
    right, given = "a b c d e f g h i", "g h i b d e"
    scores = free_scores([free(right, given), free("a b c d e f g h", "x"), free(right, None)])
    assert scores["rouge_l_long"] == pytest.approx((2 * 3 / 15 + 0) / 2)
    assert scores["f1_open"] == pytest.approx((2 * 6 / 15 + 0 + 0) / 3)
    assert "rouge_l_long" not in free_scores([free("a b c d e f g h", "x")])


def longest(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """The longest common subsequence, by definition."""

    @cache
    def of(i: int, k: int) -> int:
        if i == len(one) or k == len(other):
            return 0
        return 1 + of(i + 1, k + 1) if one[i] == other[k] else max(of(i + 1, k), of(i, k + 1))

    return of(0, 0)


@given(st.lists(st.sampled_from("abcd"), min_size=9, max_size=14), st.lists(st.sampled_from("abcde"), max_size=14))
def test_free_scores_equal_their_definitions(right: list[str], given: list[str]) -> None:
    scores = free_scores([free(" ".join(right), " ".join(given) or None)])
    shared = sum(min(right.count(word), count) for word, count in Counter(given).items())
    for key, common in (("f1_open", shared), ("rouge_l_long", longest(tuple(right), tuple(given)))):
        recall, precision = common / len(right), common / max(1, len(given))
        expected = 2 * recall * precision / (recall + precision) if common else 0
        assert scores[key] == pytest.approx(expected)
    assert scores["recall_open"] == pytest.approx(shared / len(right))
    assert all(0 <= value <= 1 for value in scores.values())


def test_scripts_without_spaces_are_compared_by_character() -> None:
    assert words("Left lung, X-ray: <5 (mm).") == ["left", "lung", "x-ray", "<5", "mm"]
    assert words("\u5de6\u80ba\uff0c\u53f3\u80ba\u3002CT") == ["\u5de6", "\u80ba", "\u53f3", "\u80ba", "ct"]
    assert words("?!") == ["?!"]
    assert words(" ") == []
