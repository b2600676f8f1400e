"""Figures of a sweep report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fedmllm.reports.drawing import BLUE, FILLS, GRAY, GREEN, INK, LOOKS, ORANGE, PURPLE, SKY, VERMILION, WIDTH, panel, rows, short, svg
from fedmllm.reports.sweep_tables import BASELINES, baseline
from fedmllm.sweeps.comparison import Sweep
from fedmllm.sweeps.pairs import Pair, acting
from fedmllm.sweeps.trained import Column

LINES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
"""Colors of learning curves; this limits the number of methods in a figure."""
MARKERS = "osD^vP*X"
DIVERGING = LinearSegmentedColormap.from_list("gain", [VERMILION, "#ffffff", BLUE])


@svg
def gains(sweep: Sweep) -> Figure:
    """Draw each method's gain over the first method, and below them the baselines' gains."""
    compared = {method: (method, sweep.reference) for method in sweep.methods if method != sweep.reference}
    return _heat_map(
        sweep, {**{name: _points(sweep, *names) for name, names in compared.items()}, **_baseline_points(sweep)}, len(compared)
    )


@svg
def strategy_gains(sweep: Sweep, found: Sequence[Pair]) -> Figure:
    """Draw each method's gain over the same method without some of its strategies."""
    return _heat_map(sweep, {pair.label: _points(acting(sweep, pair), pair.method, pair.over) for pair in found}, len(found), 3.6)


def _heat_map(sweep: Sweep, points: Mapping[str, Sequence[float]], count: int, left: float = 2.1) -> Figure:
    """Draw a field for each label and column. The first ``count`` rows set the color scale; a line separates the others."""
    found = np.array(list(points.values()))
    figure = Figure((WIDTH, 1.6 + 0.24 * len(points)))
    axes = panel(figure, left, 1.15, 0.1, 0.35)
    reach = max(1.0, float(np.nanmax(np.abs(found[:count]), initial=0)))
    axes.imshow(found, cmap=DIVERGING, norm=TwoSlopeNorm(0, -reach, reach), aspect="auto", alpha=0.85)
    size = min(7.5, 14 * (WIDTH - left) / len(sweep.columns))
    for row, column in np.argwhere(~np.isnan(found)):
        color = "#ffffff" if abs(found[row, column]) > 0.75 * reach else INK
        axes.annotate(f"{found[row, column]:+.1f}", (column, row), ha="center", va="center", fontsize=size, color=color)
    rows(axes, list(points))
    axes.set_yticks(range(len(points)), [short(label, round(16 * left)) for label in points])
    axes.axhline(count - 0.5, color=INK, linewidth=0.8 if count < len(points) else 0)
    axes.set_xticks(
        range(len(sweep.columns)), [column.scenario for column in sweep.columns], rotation=60, ha="right", rotation_mode="anchor"
    )
    axes.tick_params(axis="x", length=0)
    for place, dataset in _groups(sweep.columns):
        axes.annotate(short(dataset, 30), (place - 0.5, 1), (0, 4), axes.get_xaxis_transform(), "offset points", ha="left", fontsize=8.5)
        if place > 0:
            axes.axvline(place - 0.5, color=INK, linewidth=0.8)
    return figure


def _points(sweep: Sweep, method: str, over: str) -> list[float]:
    """Return the gain by column in percentage points, as the mean over the seeds that both methods have; NaN for none."""
    found = [(sweep.scores(method, [column]), sweep.scores(over, [column])) for column in sweep.columns]
    both = [[ours[seed] - theirs[seed] for seed in ours if seed in theirs] for ours, theirs in found]
    return [100 * mean(differences) if differences else float("nan") for differences in both]


def _baseline_points(sweep: Sweep) -> dict[str, list[float]]:
    """Return each baseline's gain over the first method, by baseline and column."""
    points = {}
    for key in BASELINES:
        levels = [(baseline(sweep, key, [column]), sweep.mean_and_error(sweep.reference, [column])) for column in sweep.columns]
        found = [100 * (level[0] - own[0]) if level and own else float("nan") for level, own in levels]
        if not np.isnan(found).all():
            points[LOOKS[key].name] = found
    return points


def _groups(columns: Sequence[Column]) -> list[tuple[int, str]]:
    """Return the first column of each dataset (and model, if there are several), with its name."""
    single = len({column.model for column in columns}) == 1
    names = [column.dataset if single else f"{column.dataset}, {column.model}" for column in columns]
    return [(i, name) for i, name in enumerate(names) if i == 0 or name != names[i - 1]]


@svg
def curves(sweep: Sweep, metric: Mapping[str, str]) -> Figure:
    """Draw a panel per dataset with scores by round, averaged over scenarios and seeds, of the first method and the best-ranked others."""
    parts = list(dict.fromkeys((column.model, column.dataset) for column in sweep.columns))
    lines, width = (len(parts) + 1) // 2, (WIDTH - 0.9) / 2
    height = 2.6 * lines + 0.6
    figure = Figure((WIDTH, height))
    for i, (model, dataset) in enumerate(parts):
        left, below = 0.45 + (i % 2) * (width + 0.4), 1.05 + 2.6 * (lines - 1 - i // 2)
        axes = panel(figure, left, below, WIDTH - left - width, height - below - 1.85, f"{short(dataset, 30)} ({metric[dataset]})")
        columns = [column for column in sweep.columns if (column.model, column.dataset) == (model, dataset)]
        drawn: list[float] = []
        for method, color, marker in zip(_leading(sweep), cycle(LINES), cycle(MARKERS), strict=False):
            by_round = _curve(sweep, method, columns)
            drawn += by_round.values()
            axes.plot(
                list(by_round), list(by_round.values()), color=color, marker=marker, markersize=4, linewidth=1.3, label=short(method, 30)
            )
        _levels(axes, {key: level[0] for key in BASELINES if (level := baseline(sweep, key, columns))}, drawn)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.grid()
        axes.set_xlabel("round")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def _levels(axes: Axes, levels: Mapping[str, float], drawn: Sequence[float]) -> None:
    """Draw lines at the baselines' scores. Scores so far away that the curves would shrink to a line are written at the edge instead."""
    low, high = min(drawn, default=0.0), max(drawn, default=1.0)
    room = 4 * max(high - low, 0.02 * high)
    near = {key: level for key, level in levels.items() if low - room <= level <= high + room}
    for key, level in levels.items():
        look = LOOKS[key]
        axes.plot([], [], color=look.color, linestyle=look.dash, linewidth=1.1, label=look.name)
        if key in near:
            axes.axhline(level, color=look.color, linestyle=look.dash, linewidth=1.1)
    if far := [f"{LOOKS[key].name} {level:.3g}" for key, level in levels.items() if key not in near]:
        axes.annotate(f"not shown: {', '.join(far)}", (1, 0), (-3, 3), "axes fraction", "offset points", ha="right", fontsize=7.5)
    shown = [low, high, *near.values()]
    pad = 0.06 * (max(shown) - min(shown)) or 0.01
    axes.set_ylim(min(shown) - pad, max(shown) + pad)


def _leading(sweep: Sweep) -> list[str]:
    """Return the first method, and the others with the lowest mean rank."""
    ranks = sweep.ranks()
    others = sorted((method for method in ranks if method != sweep.reference), key=lambda method: (ranks[method], method))
    return [sweep.reference, *others[: len(LINES) - 1]]


def _curve(sweep: Sweep, method: str, columns: Sequence[Column]) -> dict[int, float]:
    """Return the mean score over the cells by round, for the rounds in which all cells were scored."""
    cells = [cell for cell in sweep.of(method) if cell.column in columns]
    scores = [{line.round: line.watched for line in cell.run.rounds if line.watched is not None} for cell in cells]
    shared = sorted(set.intersection(*map(set, scores))) if scores else []
    return {number: mean(by_round[number] for by_round in scores) for number in shared}


@svg
def pareto(sweep: Sweep) -> Figure:
    """Draw mean score against the bytes that all clients of a run send and receive, over the columns that all methods have.

    A dashed line connects the Pareto front: methods that no other beats in both.
    """
    points = {}
    for method in sweep.methods:
        own = [cell.result for cell in sweep.of(method, sweep.shared)]
        if found := sweep.mean_and_error(method, sweep.shared):
            points[method] = (mean(result.bytes_up + result.bytes_down for result in own) / 1e6, *found)
    figure = Figure((WIDTH, max(4.4, 0.9 + 0.15 * (len(points) + len(BASELINES)))))
    axes = panel(figure, 0.6, 0.55, 2.9, 0.15)
    for (method, (size, score, error)), color, marker in zip(points.items(), cycle(FILLS), cycle(MARKERS), strict=False):
        drawn = axes.errorbar(size, 100 * score, None if error is None else 100 * error, fmt=marker, color=color, markeredgecolor=INK)
        drawn.lines[0].set_label(short(method, 34))
    front = [points[name] for name in _unbeaten({name: point[:2] for name, point in points.items()})]
    axes.plot([point[0] for point in front], [100 * point[1] for point in front], color=GRAY, linewidth=1, linestyle="--", zorder=0)
    levels = {key: 100 * level[0] for key in BASELINES if (level := baseline(sweep, key, sweep.shared))}
    _levels(axes, levels, [100 * (score + sign * (error or 0)) for _, score, error in points.values() for sign in (-1, 1)])
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
    """Return the points on the Pareto front, ordered by size: no other point is at least as small and as good, and better in one."""
    return sorted(
        (name for name, (x, y) in points.items() if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points.values())),
        key=lambda name: points[name],
    )
