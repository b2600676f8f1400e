"""The committed results: what the tables say is what the cells hold."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from fedmllm.benchmark.comparison import read_sweep
from fedmllm.benchmark.grid import cells, load_grid
from fedmllm.benchmark.grid_tables import overview_table, score_table, to_csv, to_markdown

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "nano-settings"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    with tarfile.open(RESULTS / "cells.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_the_tables_are_made_of_the_cells(unpacked: Path) -> None:
    sweep = read_sweep(unpacked)
    assert to_csv(sweep) == (RESULTS / "results.csv").read_text()
    written = (RESULTS / "tables.md").read_text()
    for dataset in ("claims", "triage"):
        assert to_markdown(score_table(sweep, "nano", dataset)) in written
    assert {cell.code for cell in sweep.cells.values()} == {"97c166288a84"}


def test_the_overview_and_its_intervals_too(unpacked: Path) -> None:
    assert to_markdown(overview_table(read_sweep(unpacked))) in (RESULTS / "tables.md").read_text()


def test_the_cells_are_the_grids(unpacked: Path) -> None:
    sweep = read_sweep(unpacked)
    asked = {(c.method, c.dataset, c.scenario, c.seed) for c in cells(load_grid(ROOT / "experiments" / "nano" / "settings.yaml"))}
    there = {(method, column.dataset, column.scenario, seed) for method, column, seed in sweep.cells}
    assert there <= asked
    assert len(there) == 816
