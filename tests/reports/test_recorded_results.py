"""The committed results: the tables follow from the cells, and the cells are those of the grid."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from fedmllm.reports.gain_tables import beside_table, overview_table
from fedmllm.reports.privacy_table import privacy_table
from fedmllm.reports.sweep_formats import to_csv, to_markdown
from fedmllm.reports.sweep_tables import score_table
from fedmllm.sweeps.comparison import Sweep, read_sweep
from fedmllm.sweeps.grid import cells, load_grid

ROOT = Path(__file__).parents[2]
GRIDS = {"nano-settings": ("settings.yaml", 1296), "nano-medical": ("medical.yaml", 72), "nano-privacy": ("privacy.yaml", 35)}
CODE = {"nano-privacy": "a395c753e1ce"}
"""The version of the code that trained the cells, if it is not that of the first grids."""
FORMER = {"Calibrated FlexLoRA": "fedmllm"}
"""Rows that were renamed after the cells were recorded."""


# The large grid takes as long as a twentieth of all fast tests together.
@pytest.fixture(scope="module", params=[pytest.param("nano-settings", marks=pytest.mark.slow), "nano-medical", "nano-privacy"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Sweep]:
    folder = tmp_path_factory.mktemp("results")
    with tarfile.open(ROOT / "docs" / "results" / request.param / "cells.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return request.param, read_sweep(folder)


def test_the_tables_follow_from_the_cells(results: tuple[str, Sweep]) -> None:
    name, sweep = results
    folder = ROOT / "docs" / "results" / name
    assert to_csv(sweep) == (folder / "results.csv").read_text()
    written = (folder / "tables.md").read_text()
    for dataset in {column.dataset for column in sweep.columns}:
        assert to_markdown(score_table(sweep, "nano", dataset)) in written
        if dataset != "claims" and (beside := beside_table(sweep, "nano", dataset)) is not None:
            assert to_markdown(beside) in written
    # This includes gains and their intervals.
    assert to_markdown(overview_table(sweep)) in written
    assert {cell.code for cell in sweep.cells.values()} == {CODE.get(name, "97c166288a84")}
    if (audits := privacy_table(sweep)) is not None:
        assert to_markdown(audits) in written
    assert (audits is not None) == (name == "nano-privacy")


def test_the_cells_are_exactly_the_grids(results: tuple[str, Sweep]) -> None:
    name, sweep = results
    file, count = GRIDS[name]
    asked = {
        (FORMER.get(c.method, c.method), c.dataset, c.scenario, c.seed) for c in cells(load_grid(ROOT / "experiments" / "nano" / file))
    }
    assert {(method, column.dataset, column.scenario, seed) for method, column, seed in sweep.cells} == asked
    assert len(asked) == count
