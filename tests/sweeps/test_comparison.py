"""Statistics over a sweep's cells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import rankdata, ttest_1samp

from fedmllm.errors import RunError
from fedmllm.evaluation.predictions import Answered
from fedmllm.run.reader import Run
from fedmllm.sweeps.comparison import Sweep, read_sweep
from fedmllm.sweeps.grid import Grid, cells
from fedmllm.sweeps.runner import Places, open_sweep, run_sweep
from fedmllm.sweeps.trained import RESAMPLES, Column, Trained

COLUMNS = tuple(Column("nano", dataset, scenario) for dataset in ("claims", "triage") for scenario in ("aligned", "missing"))


@dataclass
class Stub:
    """The part of a cell that the statistics use."""

    score: float
    resampled: NDArray[np.float64]
    same_test: bool = False


def sweep(table: dict[str, NDArray[np.float64]], noise: float = 0.0, same_test: bool = False) -> Sweep:
    """A sweep with scores by method, of shape (columns, seeds), NaN for a missing cell. Test samples add the same noise to all methods."""
    rng = np.random.default_rng(0)
    shared = noise * rng.standard_normal((*next(iter(table.values())).shape, RESAMPLES))
    found = {
        (method, COLUMNS[c], seed): Stub(scores[c, seed], scores[c, seed] + shared[c, seed], same_test)
        for method, scores in table.items()
        for c, seed in np.ndindex(scores.shape)
        if not np.isnan(scores[c, seed])
    }
    seeds = next(iter(table.values())).shape[1]
    return Sweep("test", tuple(table), COLUMNS, tuple(range(seeds)), cast(dict[tuple[str, Column, int], Trained], found))


def scores(seed: int = 0, seeds: int = 3) -> NDArray[np.float64]:
    return np.random.default_rng(seed).random((len(COLUMNS), seeds))


def test_means_and_errors_over_seeds() -> None:
    table = scores()
    found = sweep({"fedavg": table}).mean_and_error("fedavg")
    assert found == pytest.approx((table.mean(), table.mean(0).std(ddof=1) / np.sqrt(3)))
    one = sweep({"fedavg": table}).mean_and_error("fedavg", COLUMNS[:1])
    assert one == pytest.approx((table[0].mean(), table[0].std(ddof=1) / np.sqrt(3)))


def test_shared_columns_are_those_of_all_methods() -> None:
    full, part = scores(), scores(1)
    part[1] = np.nan
    part[2, 0] = np.nan
    found = sweep({"fedavg": full, "ditto": part})
    assert found.shared == (COLUMNS[0], *COLUMNS[2:])
    assert len(found.of("fedavg", found.shared)) == 3 * len(found.shared)
    part[:] = np.nan
    part[0] = 0.5
    full[0] = np.nan
    assert sweep({"fedavg": full, "ditto": part}).shared == COLUMNS


def test_a_seed_counts_only_if_it_has_all_columns() -> None:
    table = scores()
    table[2, 1] = np.nan
    found = sweep({"fedavg": table})
    assert set(found.scores("fedavg")) == {0, 2}
    assert set(found.scores("fedavg", COLUMNS[:2])) == {0, 1, 2}
    assert sweep({"fedavg": np.full((4, 3), np.nan), "fedprox": table}).mean_and_error("fedavg") is None


def test_ranks_equal_scipys_averaged_over_columns() -> None:
    tables = {name: scores(i).round(1) for i, name in enumerate(["a", "b", "c", "d"])}
    expected = np.mean([rankdata([-tables[name][c].mean() for name in tables]) for c in range(len(COLUMNS))], axis=0)
    assert sweep(tables).ranks() == pytest.approx(dict(zip(tables, expected, strict=True)))


def test_a_gain_is_paired() -> None:
    """A method that is better by 0.1 in every cell gains exactly 0.1, however noisy the test samples."""
    table = scores()
    found = sweep({"fedavg": table, "better": table + 0.1}, noise=0.2).gain("better")
    assert found is not None
    assert found.interval is not None
    assert (found.mean, found.interval.low, found.interval.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (found.won, found.cells, found.seeds) == (12, 12, 3)


def test_a_gain_that_seeds_disagree_about_is_uncertain() -> None:
    table = scores()
    found = sweep({"fedavg": table, "other": table + np.array([-0.3, 0.1, 0.3])}).gain("other")
    assert found is not None
    assert found.interval is not None
    low, high = ttest_1samp([-0.3, 0.1, 0.3], 0).confidence_interval(0.95)
    assert (found.mean, found.interval.low, found.interval.high) == pytest.approx((0.1 / 3, low, high))


def test_the_interval_over_three_seeds_covers_the_truth_in_95_percent() -> None:
    """A method is better by 0.1, and seeds move it by 0.05. A percentile bootstrap covered 75 of 100."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(600):
        table = rng.random((1, 3))
        found = sweep({"fedavg": table, "better": table + 0.1 + 0.05 * rng.standard_normal((1, 3))}).gain("better")
        assert found is not None
        assert found.interval is not None
        covered += found.interval.low <= 0.1 <= found.interval.high
    assert 0.925 < covered / 600 < 0.975


def test_the_interval_includes_the_noise_of_shared_test_samples() -> None:
    """All seeds agree on +0.1, but on the same test samples. The interval includes the bootstrap's spread of the mean over them."""
    table, rng = scores(), np.random.default_rng(0)
    found = sweep({"fedavg": table, "better": table + 0.1}, same_test=True)
    moved = 0.02 * rng.standard_normal(RESAMPLES)
    for (method, _, _), cell in found.cells.items():
        if method == "better":
            cast(Any, cell).resampled = cell.resampled + moved
    gain = found.gain("better")
    assert gain is not None
    assert gain.interval is not None
    assert gain.interval.high - gain.interval.low == pytest.approx(2 * 4.302653 * moved.std(), rel=1e-5)


def test_one_seed_has_no_interval() -> None:
    table = scores(seeds=1)
    found = sweep({"fedavg": table, "better": table + 0.1}).gain("better")
    assert found is not None
    assert (found.mean, found.interval, found.seeds) == (pytest.approx(0.1), None, 1)


@pytest.mark.parametrize(
    ("config", "same"),
    [
        ("data: {dataset: digits-claims, root: null}", False),
        ("data: {dataset: slake, root: /data/slake, num_test: 200}", True),
        ("data: {dataset: mixture, options: {parts: [{dataset: digits-vqa}, {dataset: slake, root: /data/slake}]}}", True),
        ("data: {dataset: mixture, root: null, options: {parts: [{dataset: digits-vqa, root: null}]}}", False),
        ("seed: 1", False),
    ],
)
def test_files_hold_the_same_test_samples_for_every_seed(config: str, same: bool) -> None:
    """Or overlapping samples, where fewer are drawn. Generated data differ by seed."""
    run = Run("cell", config, cast(Any, None), (), None)
    assert Trained("fedavg", COLUMNS[0], 0, "", run, ()).same_test is same


def test_a_gain_is_over_cells_that_both_methods_have() -> None:
    table, less = scores(), scores(1)
    less[:, 1:] = np.nan
    found = sweep({"fedavg": table, "other": less}).gain("other")
    assert found is not None
    assert (found.cells, found.seeds) == (4, 1)
    assert found.mean == pytest.approx((less[:, 0] - table[:, 0]).mean())
    assert sweep({"fedavg": np.full((4, 3), np.nan), "other": table}).gain("other") is None


def test_a_cells_resamples_are_the_mean_over_its_answers() -> None:
    """Resamples are the same for every model of a dataset and seed. Their spread is the bootstrap's standard error."""

    def cell(*answers: Answered) -> Trained:
        return Trained("fedavg", COLUMNS[0], 0, "", cast(Any, None), answers)

    rng = np.random.default_rng(0)
    models = [
        Answered("accuracy", ("accuracy",), np.zeros(300, int), np.ones(300, int), (rng.random(300) < p).astype(float)) for p in (0.6, 0.8)
    ]
    alone = [cell(model).resampled for model in models]
    assert np.allclose(cell(*models).resampled, np.mean(alone, axis=0))
    assert alone[0].std() == pytest.approx(np.sqrt(0.6 * 0.4 / 300), rel=0.15)


def test_a_sweep_is_read_back(tmp_path: Path) -> None:
    grid = Grid.model_validate(
        {
            "base": {
                "data": {"num_train": 24, "num_test": 8},
                "federation": {"num_clients": 2, "clients_per_round": 2, "num_rounds": 1, "min_partition_size": 4},
                "engine": {"device": "cpu"},
            },
            "methods": ["fedprox", "fedavg"],
            "rows": [{"methods": ["fedsa_lora"]}],
            "scenarios": ["missing-0.3"],
            "datasets": ["digits-claims"],
            "seeds": [3],
            "baselines": ["zero_shot"],
        }
    )
    open_sweep(grid, tmp_path / "sweep")
    with pytest.raises(RunError, match="no finished cell"):
        read_sweep(tmp_path / "sweep")
    outcomes = run_sweep(cells(grid), tmp_path / "sweep", threads=1)
    found = read_sweep(tmp_path / "sweep")
    assert found.methods == ("fedprox", "fedavg", "fedsa_lora")
    assert found.columns == (Column("nano", "digits-claims", "missing-0.3"),)
    assert found.seeds == (3,)
    for outcome in outcomes:
        cell = found.cells[outcome.cell.method, found.columns[0], 3]
        assert cell.score == outcome.score
        assert np.mean([model.score() for model in cell.answers]) == pytest.approx(cell.score)
        assert len(cell.answers) == (2 if cell.method == "fedsa_lora" else 1)
    places = Places.of(tmp_path / "sweep", cells(grid)[0])
    (places.folder / "predictions.json").write_text("{")
    with pytest.raises(RunError, match="the cell cannot be read"):
        read_sweep(tmp_path / "sweep")
    with pytest.raises(RunError, match=r"grid\.json: cannot be read"):
        read_sweep(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RunError, match="not empty and not a sweep folder"):
        open_sweep(grid, tmp_path / "other")
