"""Methods ranked by their validation scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedmllm.errors import RunError
from fedmllm.sweeps.choosing import ranked
from fedmllm.sweeps.comparison import read_sweep
from sweep_folders import METHODS, SEEDS, changed, write_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "study")


def test_methods_are_chosen_by_the_validation_part(sweep: Path) -> None:
    """The order of the test scores is different. A single cell without a validation score is refused, because only test scores would be left."""
    with pytest.raises(RunError, match=r"10 cell\(s\) have no validation score, and methods are never chosen by test scores"):
        ranked(read_sweep(sweep))
    for method, value in (("FedAvg", 0.9), ("FedProx_1 & co", 0.8), ("<b>ours</b>", 0.7)):
        changed(sweep, method, validation={"score": value})
    found = ranked(read_sweep(sweep))
    assert [choice.method for choice in found] == list(METHODS)
    assert [choice.score for choice in found] == pytest.approx([0.9, 0.8, 0.7])
    assert [choice.error for choice in found] == [0, None, None]
    changed(sweep, "FedAvg", validation={})
    with pytest.raises(RunError, match="have no validation score"):
        ranked(read_sweep(sweep))


def validated(sweep: Path, scores: Mapping[tuple[str, str, int], float]) -> Path:
    """Write the validation scores of cells by method, scenario and seed. All others score 0.5."""
    for names in (sweep / "cells").glob("*.json"):
        labels, path = json.loads(names.read_text()), names.with_suffix("") / "result.json"
        if path.exists():
            score = scores.get((labels["method"], labels["scenario"], labels["seed"]), 0.5)
            path.write_text(json.dumps(json.loads(path.read_text()) | {"validation": {"score": score}}))
    return sweep


def test_equal_scores_are_ordered_by_name(sweep: Path) -> None:
    assert [choice.method for choice in ranked(read_sweep(validated(sweep, {})))] == ["<b>ours</b>", "FedAvg", "FedProx_1 & co"]


def test_the_score_is_the_mean_over_columns_and_the_error_that_over_seeds(sweep: Path) -> None:
    """FedAvg: 0.6 and 0.8 with seed 0, 0.9 twice with seed 1. The means 0.7 and 0.9 have the standard error 0.1."""
    scores = {("FedAvg", "aligned", 0): 0.6, ("FedAvg", "missing-0.4", 0): 0.8}
    scores |= {("FedAvg", scenario, 1): 0.9 for scenario in ("aligned", "missing-0.4")}
    best = ranked(read_sweep(validated(sweep, scores)))[0]
    assert (best.method, best.score, best.error) == ("FedAvg", pytest.approx(0.8), pytest.approx(0.1))


def test_only_columns_of_all_methods_count_and_a_single_seed_has_no_error(sweep: Path) -> None:
    """Without aligned cells of one method, only missing-0.4 is left, where another method has one seed."""
    for names in list((sweep / "cells").glob("2-aligned-*.json")) + list((sweep / "cells").glob("1-missing-0.4-1.json")):
        names.unlink()
    scores = {("FedAvg", "aligned", seed): 1.0 for seed in (0, 1)} | {("FedProx_1 & co", "missing-0.4", 0): 0.7}
    found = {choice.method: choice for choice in ranked(read_sweep(validated(sweep, scores)))}
    assert {name: choice.score for name, choice in found.items()} == {"FedProx_1 & co": 0.7, "FedAvg": 0.5, "<b>ours</b>": 0.5}
    assert found["FedProx_1 & co"].error is None
    assert found["FedAvg"].error == 0


def test_without_a_column_of_all_methods_nothing_is_chosen(sweep: Path) -> None:
    """One method is finished in one column only, another only in the other."""
    for names in [*(sweep / "cells").glob("1-aligned-*.json"), *(sweep / "cells").glob("2-missing-0.4-*.json")]:
        names.unlink()
    with pytest.raises(RunError, match="no column is finished for all methods; run fedmllm sweep again"):
        ranked(read_sweep(validated(sweep, {})))


def test_a_seed_without_all_columns_does_not_count(sweep: Path) -> None:
    """Otherwise a method would gain from a hard cell that has not finished."""
    scores = {(method, "aligned", seed): 0.9 for method in METHODS for seed in SEEDS}
    scores |= {(method, "missing-0.4", seed): 0.1 for method in METHODS for seed in SEEDS}
    assert [choice.score for choice in ranked(read_sweep(validated(sweep, scores)))] == pytest.approx([0.5] * 3)
    for names in (sweep / "cells").glob("0-missing-0.4-1.json"):
        names.unlink()
    assert [choice.score for choice in ranked(read_sweep(sweep))] == pytest.approx([0.5] * 3)
    for names in (sweep / "cells").glob("0-aligned-0.json"):
        names.unlink()
    with pytest.raises(RunError, match="FedAvg: no seed is finished in all of the 2 columns to compare; run fedmllm sweep again"):
        ranked(read_sweep(sweep))
