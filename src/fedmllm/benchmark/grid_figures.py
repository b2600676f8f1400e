"""The pictures of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import mean

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fedmllm.benchmark.comparison import Column, Sweep
from fedmllm.benchmark.drawing import BLUE, FILLS, GRAY, GREEN, INK, LOOKS, ORANGE, PURPLE, SKY, VERMILION, WIDTH, panel, rows, short, svg
from fedmllm.benchmark.grid_tables import BASELINES, baseline

LINES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
"""Of learning curves: as many methods as are told apart."""
MARKERS = "osD^vP*X"
DIVERGING = LinearSegmentedColormap.from_list("gain", [VERMILION, "#ffffff", BLUE])


@svg
def gains(sweep: Sweep) -> Figure:
    """A field for each method and column: percentage points above the first method, over the seeds that both have."""
    methods = [method for method in sweep.methods if method != sweep.reference]
    found = np.array([[_points(sweep, method, column) for column in sweep.columns] for method in methods])
    figure = Figure((WIDTH, 1.6 + 0.24 * len(methods)))
    axes = panel(figure, 2.1, 1.15, 0.1, 0.35)
    reach = max(1.0, float(np.nanmax(np.abs(found), initial=0)))
    axes.imshow(found, cmap=DIVERGING, norm=TwoSlopeNorm(0, -reach, reach), aspect="auto", alpha=0.85)
    for row, column in np.argwhere(~np.isnan(found)):
        value = found[row, column]
        color = "#ffffff" if abs(value) > 0.75 * reach else INK
        axes.annotate(
            f"{value:+.1f}", (column, row), ha="center", va="center", fontsize=7.5 if len(sweep.columns) <= 16 else 6, color=color
        )
    rows(axes, methods)
    axes.set_yticks(range(len(methods)), [short(method, 34) for method in methods])
    axes.set_xticks(
        range(len(sweep.columns)), [column.scenario for column in sweep.columns], rotation=60, ha="right", rotation_mode="anchor"
    )
    axes.tick_params(axis="x", length=0)
    for place, dataset in _groups(sweep.columns):
        axes.annotate(short(dataset, 30), (place - 0.5, 1), (0, 4), axes.get_xaxis_transform(), "offset points", ha="left", fontsize=8.5)
        if place > 0:
            axes.axvline(place - 0.5, color=INK, linewidth=0.8)
    return figure


def _points(sweep: Sweep, method: str, column: Column) -> float:
    """Mean over the seeds that both have, in percentage points; NaN for none."""
    ours, theirs = sweep.scores(method, [column]), sweep.scores(sweep.reference, [column])
    both = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return 100 * mean(both) if both else float("nan")


def _groups(columns: Sequence[Column]) -> list[tuple[int, str]]:
    """Where a dataset, or model, begins."""
    single = len({column.model for column in columns}) == 1
    names = [column.dataset if single else f"{column.dataset}, {column.model}" for column in columns]
    return [(i, name) for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


@svg
def curves(sweep: Sweep, metric: Mapping[str, str]) -> Figure:
    """A panel for each dataset: scores by round, over scenarios and seeds, of the methods that end highest and the first one."""
    parts = list(dict.fromkeys((column.model, column.dataset) for column in sweep.columns))
    lines, width = (len(parts) + 1) // 2, (WIDTH - 0.9) / 2
    height = 2.6 * lines + 0.6
    figure = Figure((WIDTH, height))
    for i, (model, dataset) in enumerate(parts):
        left, below = 0.45 + (i % 2) * (width + 0.4), 1.05 + 2.6 * (lines - 1 - i // 2)
        axes = panel(figure, left, below, WIDTH - left - width, height - below - 1.85, f"{short(dataset, 30)} ({metric[dataset]})")
        columns = [column for column in sweep.columns if (column.model, column.dataset) == (model, dataset)]
        for method, color, marker in zip(_leading(sweep), cycle(LINES), cycle(MARKERS), strict=False):
            by_round = _curve(sweep, method, columns)
            axes.plot(
                list(by_round), list(by_round.values()), color=color, marker=marker, markersize=4, linewidth=1.3, label=short(method, 30)
            )
        for key in BASELINES:
            if level := baseline(sweep, key, columns):
                axes.axhline(level[0], color=LOOKS[key].color, linestyle=LOOKS[key].dash, linewidth=1.1, label=LOOKS[key].name)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.grid()
        axes.set_xlabel("round")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def _leading(sweep: Sweep) -> list[str]:
    """The first method, and those of the lowest mean rank."""
    ranks = sweep.ranks()
    others = sorted((method for method in ranks if method != sweep.reference), key=lambda method: (ranks[method], method))
    return [sweep.reference, *others[: len(LINES) - 1]]


def _curve(sweep: Sweep, method: str, columns: Sequence[Column]) -> dict[int, float]:
    """By round, the mean over the cells, of the rounds after which all were scored."""
    cells = [cell for cell in sweep.of(method) if cell.column in columns]
    scores = [{line.round: line.score for line in cell.run.rounds if line.score is not None} for cell in cells]
    shared = sorted(set.intersection(*map(set, scores))) if scores else []
    return {number: mean(by_round[number] for by_round in scores) for number in shared}


@svg
def pareto(sweep: Sweep) -> Figure:
    """Mean score against the bytes that all clients of a run send and receive; a line along the methods that none beats in both."""
    points = {}
    for method in sweep.methods:
        own = [cell.result for cell in sweep.of(method)]
        if found := sweep.mean_and_error(method):
            points[method] = (mean(result.bytes_up + result.bytes_down for result in own) / 1e6, *found)
    figure = Figure((WIDTH, 4.4))
    axes = panel(figure, 0.6, 0.55, 2.9, 0.15)
    for (method, (size, score, error)), color, marker in zip(points.items(), cycle(FILLS), cycle(MARKERS), strict=False):
        drawn = axes.errorbar(size, 100 * score, None if error is None else 100 * error, fmt=marker, color=color, markeredgecolor=INK)
        drawn.lines[0].set_label(short(method, 34))
    front = [points[name] for name in _unbeaten({name: point[:2] for name, point in points.items()})]
    axes.plot([point[0] for point in front], [100 * point[1] for point in front], color=GRAY, linewidth=1, linestyle="--", zorder=0)
    for key in BASELINES:
        if level := baseline(sweep, key, sweep.columns):
            axes.axhline(100 * level[0], color=LOOKS[key].color, linestyle=LOOKS[key].dash, linewidth=1)
            axes.annotate(LOOKS[key].name, (0, 100 * level[0]), (3, 2), axes.get_yaxis_transform(), "offset points", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid()
    axes.set_xlabel("megabytes sent and received in a run")
    axes.set_ylabel("mean score, percent")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=7.5, labelspacing=0.3)
    return figure


def _unbeaten(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """By size: those for which no other is as small and as good, and better in one."""
    return sorted(
        (name for name, (x, y) in points.items() if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points.values())),
        key=lambda name: points[name],
    )
