"""Scores of predictions, their standard errors, and the scores of answers without content."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from fedmllm.errors import DataError
from fedmllm.evaluation.metrics import accuracy, all_metrics, auc, macro_f1, majority_score, question_score, score, standard_error
from fedmllm.evaluation.predictions import SIDE_BY_SIDE, answered
from fedmllm.types import AnswerType, Sample
from predicted import binary, free, multi


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


def test_accuracy_hides_rare_classes_and_balanced_accuracy_does_not() -> None:
    """Always the most frequent answer: 8 of 10 right, and chance level where classes count equally."""
    numbers = all_metrics("macro_f1", [multi("a", "a")] * 8 + [multi("b", "a")] * 2, seed=0)
    assert [numbers[name] for name in SIDE_BY_SIDE] == pytest.approx([0.8, 0.5, (16 / 18 + 0) / 2])


def test_a_failure_is_not_a_class() -> None:
    assert macro_f1([multi("a", "a"), multi("b", None)]) == pytest.approx(0.5)


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


def test_accuracy_by_answer_type() -> None:
    rows = [free("yes", "yes", "closed"), free("no", "yes", "closed"), free("ct", "CT"), free("lung", None), free("a", "b")]
    numbers = all_metrics("accuracy", rows, seed=0)
    assert numbers["score"] == accuracy(rows) == pytest.approx(2 / 5)
    assert numbers["accuracy_closed"] == pytest.approx(1 / 2)
    assert numbers["accuracy_open"] == pytest.approx(1 / 3)
    assert (numbers["num_samples"], numbers["failures"]) == (5, 1)


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
