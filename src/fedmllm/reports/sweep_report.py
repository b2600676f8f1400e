"""Writes the report of a sweep: an HTML page, and the tables as Markdown, LaTeX and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedmllm.files import write_atomically
from fedmllm.reports import sweep_figures as grid_figures
from fedmllm.reports.gain_tables import beside_table, overview_table, strategy_table
from fedmllm.reports.privacy_table import privacy_table
from fedmllm.reports.run_report import METRICS, page
from fedmllm.reports.sweep_formats import to_csv, to_latex, to_markdown
from fedmllm.reports.sweep_tables import Table, client_table, hard_table, score_table, tested_table
from fedmllm.sweeps.comparison import Sweep, read_sweep
from fedmllm.sweeps.pairs import pairs


def write_sweep_report(folder: Path) -> Path:
    """Write ``report.html``, ``tables.md``, ``tables.tex`` and ``results.csv`` to a sweep folder.

    Returns:
        The path of ``report.html``.

    Raises:
        RunError: if no cell is finished, or one cannot be read.
    """
    sweep = read_sweep(folder)
    tables = _tables(sweep)
    write_atomically(folder / "tables.md", "\n".join(map(to_markdown, tables)).encode())
    write_atomically(folder / "tables.tex", "\n".join(map(to_latex, tables)).encode())
    write_atomically(folder / "results.csv", to_csv(sweep).encode())
    write_atomically(folder / "report.html", page("sweep.html.j2", _context(sweep, tables)).encode())
    return folder / "report.html"


def _tables(sweep: Sweep) -> list[Table]:
    """Return the overview, the scores by model and dataset, and the further tables that have data."""
    parts = dict.fromkeys((column.model, column.dataset) for column in sweep.columns)
    scores = [score_table(sweep, model, dataset) for model, dataset in parts]
    others = [
        strategy_table(sweep, pairs(sweep)),
        *(beside_table(sweep, model, dataset) for model, dataset in parts),
        *(hard_table(sweep, model, dataset) for model, dataset in parts),
    ]
    others += [client_table(sweep), tested_table(sweep), privacy_table(sweep)]
    return [overview_table(sweep), *scores, *(table for table in others if table is not None)]


def _context(sweep: Sweep, tables: list[Table]) -> dict[str, Any]:
    """Return all values that the template shows."""
    by_name, cells = {table.name: table for table in tables}, sweep.cells.values()
    metric = {cell.column.dataset: METRICS.get(cell.run.manifest.metric, cell.run.manifest.metric) for cell in cells}
    added = pairs(sweep)
    curved = any(sum(line.watched is not None for line in cell.run.rounds) > 1 for cell in cells)
    return {
        "title": sweep.name,
        "validated": any(line.validation is not None for cell in cells for line in cell.run.rounds),
        "sweep": sweep,
        "cells": len(cells),
        "missing": len(sweep.methods) * len(sweep.columns) * len(sweep.seeds) - len(cells),
        "codes": sorted({cell.code for cell in cells}),
        "seconds": sum(cell.result.seconds for cell in cells),
        "versions": next(iter(cells)).result.versions,
        "overview": by_name["overview"],
        "score_tables": [table for table in tables if table.name.startswith("scores-")],
        "beside_tables": [table for table in tables if table.name.startswith("beside-")],
        "hard_tables": [table for table in tables if table.name.startswith("hard-")],
        "clients": by_name.get("clients"),
        "tested": by_name.get("tested"),
        "privacy": by_name.get("privacy"),
        "pareto_figure": grid_figures.pareto(sweep),
        "gains_figure": grid_figures.gains(sweep) if len(sweep.methods) > 1 else None,
        "strategies": by_name.get("strategies"),
        "strategies_figure": grid_figures.strategy_gains(sweep, added) if added else None,
        "curves_figure": grid_figures.curves(sweep, metric) if curved else None,
    }
