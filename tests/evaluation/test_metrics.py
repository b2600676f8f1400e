from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from fedmllm.errors import DataError
from fedmllm.evaluation.metrics import accuracy, all_metrics, auc, macro_f1, majority_score, question_score, score, standard_error
from fedmllm.evaluation.predictions import SIDE_BY_SIDE, answered, from_record, to_record
from fedmllm.evaluation.text import free_scores, is_failure, is_right, normalize, words, yes_or_no
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


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.5, 0.5 + 1e-12, 0.9, 1.0])), min_size=2, max_size=30))
def test_auc_equals_scikit_learn(rows: list[tuple[int, float]]) -> None:
    labels = [label for label, _ in rows]
    predictions = [binary(*row) for row in rows]
    if len(set(labels)) < 2:
        with pytest.raises(DataError, match="both classes"):
            auc(predictions)
        return
    assert auc(predictions) == pytest.approx(roc_auc_score(labels, [p for _, p in rows]), abs=1e-12)


def test_auc_uses_probabilities_not_hard_answers() -> None:
    assert auc([binary(0, 0.6), binary(1, 0.7), binary(0, 0.55), binary(1, 0.9)]) == 1.0


def test_a_failure_never_raises_the_auc() -> None:
    good = [binary(0, 0.1), binary(0, 0.2), binary(1, 0.8), binary(1, 0.9)]
    assert auc(good) == 1.0
    assert auc([*good[:3], binary(1, None)]) == 0.5
    assert auc([binary(0, None), *good[1:]]) == 0.5
    assert auc([binary(0, None), binary(1, None)]) == 0.0


def test_auc_needs_two_options() -> None:
    with pytest.raises(DataError, match="two options"):
        auc([multi("a", "a"), multi("b", "b")])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=40))
def test_macro_f1_equals_scikit_learn_over_occurring_classes(rows: list[tuple[str, str | None]]) -> None:
    truth, guess = [t for t, _ in rows], [g or "failed" for _, g in rows]
    expected = f1_score(truth, guess, labels=sorted(set(truth)), average="macro", zero_division=0)
    assert macro_f1([multi(*row) for row in rows]) == pytest.approx(expected, abs=1e-12)


Rows = list[tuple[str, str | None]]


def reference_scores(truth: Sequence[str], guess: Sequence[str]) -> dict[str, float]:
    """Scikit-learn's scores over the classes that occur."""
    labels = sorted(set(truth))
    return {
        "accuracy": float(np.mean(np.array(truth) == np.array(guess))),
        "balanced_accuracy": float(recall_score(truth, guess, labels=labels, average="macro", zero_division=0)),
        "macro_f1": float(f1_score(truth, guess, labels=labels, average="macro", zero_division=0)),
    }


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", None])), min_size=1, max_size=40))
def test_accuracy_balanced_accuracy_and_macro_f1_equal_scikit_learn(rows: Rows) -> None:
    """For any headline."""
    expected = reference_scores([t for t, _ in rows], [g or "failed" for _, g in rows])
    for headline in ("macro_f1", "accuracy"):
        numbers = all_metrics(headline, [multi(*row) for row in rows], seed=0)
        assert {name: numbers[name] for name in SIDE_BY_SIDE} == pytest.approx(expected, abs=1e-12)
        assert numbers[headline] == numbers["score"]


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.5, 0.51, None])), min_size=2, max_size=40))
def test_class_metrics_are_reported_beside_an_auc(rows: list[tuple[int, float | None]]) -> None:
    """Computed from the chosen options: even odds choose the first option, a failure chooses none."""
    assume(len({label for label, _ in rows}) == 2)
    predictions = [binary(*row) for row in rows]
    expected = reference_scores([("no", "yes")[label] for label, _ in rows], [p.answer or "failed" for p in predictions])
    numbers = all_metrics("auc", predictions, seed=0)
    assert {name: numbers[name] for name in SIDE_BY_SIDE} == pytest.approx(expected, abs=1e-12)


def test_accuracy_hides_rare_classes_and_balanced_accuracy_does_not() -> None:
    """Always the most frequent answer: 8 of 10 right, and chance level where classes count equally."""
    numbers = all_metrics("macro_f1", [multi("a", "a")] * 8 + [multi("b", "a")] * 2, seed=0)
    assert [numbers[name] for name in SIDE_BY_SIDE] == pytest.approx([0.8, 0.5, (16 / 18 + 0) / 2])


def test_questions_without_classes_have_accuracy_only() -> None:
    """For free answers, and for options whose order or set differs by question."""
    for rows in ([free("a", "a")], [multi("a", "a"), multi("a", "a", ("b", "a"))]):
        assert set(all_metrics("accuracy", rows, seed=0)) & set(SIDE_BY_SIDE) == {"accuracy"}


def test_class_metrics_of_a_mixture_are_means_over_datasets() -> None:
    parts = {"claims": [binary(0, 0.1), binary(1, 0.2), binary(1, 0.9)], "triage": [multi("a", "a"), multi("b", "c"), multi("b", "b")]}
    named = [replace(p, sample=replace(p.sample, domain=domain)) for domain, part in parts.items() for p in part]
    numbers = all_metrics("mixed", named, seed=0)
    for name in SIDE_BY_SIDE:
        assert numbers[name] == pytest.approx(np.mean([all_metrics("macro_f1", part, seed=0)[name] for part in parts.values()]))
    with_free = [*named, replace(free("x", "x"), sample=replace(free("x", "x").sample, domain="cards"))]
    assert set(all_metrics("mixed", with_free, seed=0)) & set(SIDE_BY_SIDE) == {"accuracy"}


def test_a_failure_is_not_a_class() -> None:
    assert macro_f1([multi("a", "a"), multi("b", None)]) == pytest.approx(0.5)


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


@pytest.mark.parametrize(("right", "wrong"), [("+", "-"), ("yes", "Yes."), ("a", "a."), ("café", "cafe\u0301"), (".", ",")])
def test_options_are_compared_by_position_not_by_text(right: str, wrong: str) -> None:
    """Normalization plays no role: the majority answer of an even split is right half of the time."""
    rows = [multi(right, guess, (right, wrong)) for guess in (right, wrong)]
    assert accuracy(rows) == 0.5
    even = [p.sample for p in rows] + [multi(wrong, wrong, (right, wrong)).sample] * 2
    assert majority_score("accuracy", even, even) == 0.5
    assert majority_score("accuracy", [*even, even[2]], even[:2]) == 0.0


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1"])
def test_a_majority_answer_that_a_question_does_not_offer_is_wrong(metric: str) -> None:
    """The second question does not offer "cat", the most frequent answer."""
    cat, fly = multi("cat", None, ("dog", "cat")).sample, multi("fly", None, ("ant", "fly")).sample
    assert majority_score(metric, [cat, cat, fly], [cat, fly]) == pytest.approx({"accuracy": 1 / 2, "macro_f1": 2 / 3}[metric])


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


def test_accuracy_by_answer_type() -> None:
    rows = [free("yes", "yes", "closed"), free("no", "yes", "closed"), free("ct", "CT"), free("lung", None), free("a", "b")]
    numbers = all_metrics("accuracy", rows, seed=0)
    assert numbers["score"] == accuracy(rows) == pytest.approx(2 / 5)
    assert numbers["accuracy_closed"] == pytest.approx(1 / 2)
    assert numbers["accuracy_open"] == pytest.approx(1 / 3)
    assert (numbers["num_samples"], numbers["failures"]) == (5, 1)


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 0.51, 1.0])), min_size=2, max_size=40))
def test_the_auc_of_choices_equals_scikit_learn(rows: list[tuple[bool, float]]) -> None:
    """Even odds choose the first option, as the answer does."""
    truth = [int(label) for label, _ in rows]
    assume(len(set(truth)) == 2)
    hard = answered("auc", [binary(label, p) for label, (_, p) in zip(truth, rows, strict=True)]).hard()
    assert hard.score() == pytest.approx(roc_auc_score(truth, [p > 0.5 for _, p in rows]), abs=1e-12)


def test_a_failure_lowers_the_auc_of_choices() -> None:
    """Two pairs: the failed positive ranks below its negative, the right one above."""
    numbers = all_metrics("auc", [binary(0, 0.2), binary(1, None), binary(1, 0.9)], seed=0)
    assert (numbers["auc_hard"], numbers["failures"]) == (0.5, 1)
    assert "auc_hard" not in all_metrics("accuracy", [free("a", "a")], seed=0)


def test_hard_guesses_do_not_change_other_datasets_of_a_mixture() -> None:
    rows = [binary(0, 0.6), binary(1, 0.7), multi("c", "c")]
    mixed = [replace(p, sample=replace(p.sample, domain=domain)) for p, domain in zip(rows, ("claims", "claims", "triage"), strict=True)]
    assert answered("mixed", mixed).hard().guess.tolist() == [1.0, 1.0, 2.0]


def test_standard_error_of_a_share() -> None:
    """The bootstrap over 0/1 values estimates sqrt(p (1 - p) / n)."""
    rows = [free("a", "a" if i % 4 else "b") for i in range(400)]
    assert standard_error("accuracy", rows, 0) == pytest.approx(np.sqrt(0.75 * 0.25 / 400), rel=0.15)


def test_standard_error_exists_for_a_rare_class() -> None:
    rows = [binary(0, 0.1), binary(0, 0.3), binary(0, 0.2), binary(1, 0.25)]
    assert np.isfinite(standard_error("auc", rows, 0))


def samples(answers: str, kind: AnswerType = "open", options: tuple[str, ...] = ()) -> list[Sample]:
    return [Sample(f"{kind}{i}", "q", answer, {"text": "t"}, options=options, answer_type=kind) for i, answer in enumerate(answers)]


def test_majority_score() -> None:
    train = samples("aab", "open") + samples("yyn", "closed")
    assert majority_score("accuracy", train, samples("abz", "open") + samples("yn", "closed")) == pytest.approx(2 / 5)
    assert majority_score("auc", [], []) == 0.5
    options = ("a", "b")
    assert majority_score("macro_f1", samples("aab", "choice", options), samples("ab", "choice", options)) == pytest.approx((2 / 3 + 0) / 2)


def test_a_tied_majority_does_not_depend_on_the_order() -> None:
    test = samples("ab")
    assert majority_score("accuracy", samples("ab"), test) == majority_score("accuracy", samples("ba"), test)


def test_a_mixture_is_the_mean_of_its_datasets_by_their_own_metrics() -> None:
    """A resample without one dataset is the mean of the others."""
    rows = {
        "claims": [binary(0, 0.1), binary(1, 0.9), binary(1, 0.05)],
        "triage": [multi("a", "a"), multi("b", "c")],
        "cards": [free("x", "x")],
    }
    named = [replace(p, sample=replace(p.sample, domain=domain)) for domain, part in rows.items() for p in part]
    own = [auc(rows["claims"]), macro_f1(rows["triage"]), accuracy(rows["cards"])]
    assert score("mixed", named) == pytest.approx(np.mean(own))
    assert answered("mixed", named).score(np.array([0, 1, 2, 3, 4])) == pytest.approx(np.mean(own[:2]))


@pytest.mark.parametrize("metric", ["auc", "macro_f1", "accuracy"])
def test_a_resamples_score_equals_the_score_of_its_predictions(metric: str) -> None:
    rng = np.random.default_rng(0)
    rows = [binary(int(rng.integers(2)), None if i % 9 == 0 else float(rng.random())) for i in range(60)]
    for _ in range(5):
        chosen = rng.integers(60, size=60)
        assert answered(metric, rows).score(chosen) == pytest.approx(score(metric, [rows[i] for i in chosen]), abs=1e-15)


@pytest.mark.parametrize("metric", ["auc", "macro_f1", "accuracy"])
def test_answers_survive_json(metric: str) -> None:
    """Failures stay distinct from any probability."""
    models = [answered(metric, [binary(i % 2, None if i % 5 == k else i / 20) for i in range(20)]) for k in range(2)]
    again = from_record(json.loads(json.dumps(to_record(models), allow_nan=False)))
    for before, after in zip(models, again, strict=True):
        assert (after.metric, after.metrics) == (before.metric, before.metrics)
        for name in ("domain", "truth", "guess"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_the_question_score_counts_answers_by_question() -> None:
    """A model that only knows how frequent each question's answers are must not pass for one that looks."""

    def asked(question: str, *answers: str) -> list[Sample]:
        return [Sample(f"{question}{i}", question, answer, {}, answer_type="open") for i, answer in enumerate(answers)]

    train = asked("Which color?", "red", "red", "red", "blue") + asked("How many?", "two", "two", "one") + asked("Where?", "left")
    test = asked("which  color?", "red", "red") + asked("How many?", "two", "two", "one") + asked("New?", "red")
    assert majority_score("accuracy", train, test) == pytest.approx(3 / 6)
    assert question_score("accuracy", train, test) == pytest.approx(5 / 6)
    assert question_score("accuracy", train, test[:2]) is None
    assert question_score("auc", train, test) is None
