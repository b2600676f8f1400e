"""Predictions as numbers: the scores of a classification, of resamples, and of answers read back from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from fedmllm.evaluation.metrics import all_metrics, score
from fedmllm.evaluation.predictions import SIDE_BY_SIDE, answered, from_record, to_record
from predicted import binary, free, multi

Rows = list[tuple[str, str | None]]


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


@given(st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.1, 0.5, 0.51, None])), min_size=2, max_size=40))
def test_class_metrics_are_reported_beside_an_auc(rows: list[tuple[int, float | None]]) -> None:
    """Computed from the chosen options: even odds choose the first option, a failure chooses none."""
    assume(len({label for label, _ in rows}) == 2)
    predictions = [binary(*row) for row in rows]
    expected = reference_scores([("no", "yes")[label] for label, _ in rows], [p.answer or "failed" for p in predictions])
    numbers = all_metrics("auc", predictions, seed=0)
    assert {name: numbers[name] for name in SIDE_BY_SIDE} == pytest.approx(expected, abs=1e-12)


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


def test_class_metrics_of_a_mixture_are_means_over_datasets() -> None:
    parts = {"claims": [binary(0, 0.1), binary(1, 0.2), binary(1, 0.9)], "triage": [multi("a", "a"), multi("b", "c"), multi("b", "b")]}
    named = [replace(p, sample=replace(p.sample, domain=domain)) for domain, part in parts.items() for p in part]
    numbers = all_metrics("mixed", named, seed=0)
    for name in SIDE_BY_SIDE:
        assert numbers[name] == pytest.approx(np.mean([all_metrics("macro_f1", part, seed=0)[name] for part in parts.values()]))
    with_free = [*named, replace(free("x", "x"), sample=replace(free("x", "x").sample, domain="cards"))]
    assert set(all_metrics("mixed", with_free, seed=0)) & set(SIDE_BY_SIDE) == {"accuracy"}


def test_questions_without_classes_have_accuracy_only() -> None:
    """For free answers, and for options whose order or set differs by question."""
    for rows in ([free("a", "a")], [multi("a", "a"), multi("a", "a", ("b", "a"))]):
        assert set(all_metrics("accuracy", rows, seed=0)) & set(SIDE_BY_SIDE) == {"accuracy"}
