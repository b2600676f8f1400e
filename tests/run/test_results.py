"""The result of a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib import pyplot
from safetensors.torch import load_file

from fedmllm.errors import RunError
from fedmllm.evaluation.predictions import SIDE_BY_SIDE
from fedmllm.run.results import SCORES, RunResult, worst_decile
from trained_runs import outcome


def test_the_result_is_complete(finished: Path) -> None:
    record = json.loads((finished / "result.json").read_text())
    assert record["metric"] == "auc"
    assert set(record["scores"]) == set(SCORES)
    asked = {name: score for name, score in record["scores"].items() if score is not None}
    assert set(record["scores"]) - set(asked) == {"calibrated_local_mean", "calibrated_centralized"}
    assert all(0 <= score <= 1 for score in asked.values())
    # The three metrics are reported beside any headline, also for the clients' mean.
    assert all(set(SIDE_BY_SIDE) <= set(record["details"][name]) for name in asked if name != "ceiling")
    assert record["scores"]["local_mean"] == pytest.approx(sum(record["local"].values()) / 3)
    adapter = load_file(finished / "adapter" / "adapter_model.safetensors")
    sent = sum(tensor.nbytes for tensor in adapter.values())
    assert record["bytes_up"] == record["bytes_down"] == 3 * 2 * sent
    assert record["trainable_parameters"] * 4 == sent
    assert record["seconds"] > 0
    assert record["seed"] == 0
    assert {"fedmllm", "torch", "transformers", "peft"} <= set(record["versions"])
    assert outcome(finished).to_record() == record


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.5], 0.5), ([0.9, 0.2, 0.4], 0.2), ([i / 10 for i in range(10)], 0.0), ([i / 10 for i in range(11)], 0.05), ([0.3] * 40, 0.3)],
)
def test_worst_decile(scores: list[float], expected: float) -> None:
    """With ten clients it is the lowest score; with eleven the mean of the lowest two, (0 + 0.1) / 2."""
    assert worst_decile(scores) == pytest.approx(expected)


@pytest.fixture(scope="module")
def result(finished: Path) -> RunResult:
    """The result with its folder, as ``train`` returns it."""
    return replace(outcome(finished), folder=finished)


def test_the_history_is_a_flat_row_for_each_round(result: RunResult) -> None:
    rows = result.history()
    federated = [row for row in rows if row["stage"] == "federated"]
    assert [row["round"] for row in federated] == [1, 2, 3]
    assert federated[-1]["test_score"] == federated[-1]["score"] == result.scores["federated"]
    assert federated[0]["score"] is None
    assert "test_score" not in federated[0]
    assert ["validation_score" in row for row in federated] == [False, True, True]
    assert rows[0]["test_score"] == result.scores["zero_shot"]
    assert all(isinstance(value, (int, float, str, type(None))) for row in rows for value in row.values())


def test_the_plot_shows_the_score_by_round_and_the_two_bounds(result: RunResult) -> None:
    axes = result.plot()
    pyplot.close(axes.figure)
    labels = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert labels["test split"] == [result.scores["federated"]]
    assert len(labels["validation split"]) == 2
    for name, label in (("zero_shot", "zero-shot, test split"), ("centralized", "centralized, test split")):
        assert set(labels[label]) == {result.scores[name]}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("round", result.metric)


def test_a_result_read_from_a_file_has_no_history(finished: Path) -> None:
    with pytest.raises(RunError, match=r"use the result that fedmllm\.train returns"):
        outcome(finished).history()


@pytest.mark.parametrize(
    ("reached", "majority", "question_only", "below"),
    [
        (0.6, 0.5, None, []),
        (0.5, 0.5, None, ["the majority answer"]),
        (0.5, 0.4, 0.6, ["the most frequent answer to each question"]),
        (0.4, 0.5, 0.6, ["the majority answer", "the most frequent answer to each question"]),
        (0.4, None, None, []),
        (None, 0.5, 0.6, []),
    ],
)
def test_baselines_that_the_model_does_not_beat_are_named(
    result: RunResult, reached: float | None, majority: float | None, question_only: float | None, below: list[str]
) -> None:
    """A tie counts. Under the AUC the majority answer is chance."""
    found = replace(result, metric="accuracy", scores={"federated": reached}, majority=majority, question_only=question_only)
    assert found.below == below
    assert replace(found, metric="auc").below == [name.replace("the majority answer", "chance") for name in below]


def test_the_other_class_metrics_are_shown_beside_the_headline(result: RunResult) -> None:
    assert result.beside == ("accuracy", "balanced_accuracy", "macro_f1")
    assert replace(result, metric="macro_f1").beside == ("accuracy", "balanced_accuracy")
    assert replace(result, details={"federated": {"accuracy": 0.5}}).beside == ("accuracy",)
    assert replace(result, details={}).beside == ()
