"""Figures of a run report. Each function takes a run's numbers and returns SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedmllm.format import byte_unit, duration
from fedmllm.reports.drawing import (
    BLUE,
    FILLS,
    GRAY,
    HATCHES,
    INK,
    LOOKS,
    MODELS,
    ORANGE,
    PALE,
    WIDTH,
    Group,
    bars,
    panel,
    rows,
    short,
    svg,
)
from fedmllm.run.reader import Client, Round
from fedmllm.run.results import worst_decile

MAX_GROUPS = 12
"""Maximum number of labels in one figure; rarer ones are grouped as 'other'."""
DOT, LARGEST_DOT = 36.0, 420.0
"""Areas in square points of one client's dot and of the largest dot that fits its row."""
LONGEST_NAME = 15
"""Maximum number of characters in a name that fits the default margin."""
MAX_NAMED = 40
"""Maximum number of clients with names next to their bars. With more, bars are sorted by size and have no names."""


@svg
def final_scores(
    scores: Mapping[str, float | None],
    errors: Mapping[str, float | None],
    clients: Mapping[str, Sequence[float]],
    baseline: tuple[str, float] | None,
    metric: str,
) -> Figure:
    """Draw a marker per stage, whiskers of one standard error, and a tick per client for stages with one model per client."""
    shown = {stage: score for stage in LOOKS if (score := scores.get(stage)) is not None}
    figure = Figure((WIDTH, 0.85 + 0.34 * len(shown)))
    names = [LOOKS[stage].name for stage in shown]
    axes = panel(figure, 1.1 if max(map(len, names)) <= LONGEST_NAME else 1.7, 0.5, 1.05, 0.3)
    rows(axes, names)
    axes.grid()
    for row, (stage, score) in enumerate(shown.items()):
        look, error, ticks = LOOKS[stage], errors.get(stage), clients.get(stage, ())
        axes.plot(ticks, [row] * len(ticks), "|", color=look.color, markersize=10, alpha=0.6 if len(ticks) <= MAX_NAMED else 0.25)
        axes.errorbar(score, row, xerr=error, fmt=look.marker, color=look.color, markersize=6.5, capsize=4, elinewidth=1.4, capthick=1.4)
        text = f"{score:.3f}" + ("" if error is None else f" ± {error:.3f}")
        axes.annotate(text, (1, row), (10, 0), axes.get_yaxis_transform(), "offset points", va="center")
    if baseline is not None:
        axes.axvline(baseline[1], color=GRAY, linewidth=1, linestyle=":")
        axes.annotate(baseline[0], (baseline[1], 1), (0, 4), axes.get_xaxis_transform(), "offset points", ha="center", fontsize=8.5)
    axes.set_xlabel(metric)
    return figure


@svg
def client_scores(scores: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw a row per kind of model, with dots at the clients' scores and lines at the mean and the worst decile. Equal scores make larger dots."""
    shown = {model: list(scores[model].values()) for model in MODELS if scores.get(model)}
    dots = {model: Counter(values) for model, values in shown.items()}
    area = min(DOT, LARGEST_DOT / max(max(count.values()) for count in dots.values()))
    figure = Figure((WIDTH, 0.7 + 0.42 * len(shown)))
    axes = panel(figure, 1.1, 0.5, 2.45, 0.1)
    rows(axes, [MODELS[model].name for model in shown])
    axes.grid()
    for row, (model, values) in enumerate(shown.items()):
        look, average, worst = MODELS[model], mean(values), worst_decile(values)
        areas = [area * number for number in dots[model].values()]
        axes.scatter(list(dots[model]), [row] * len(areas), s=areas, color=look.color, marker=look.marker, alpha=0.6, linewidths=0)
        for level, dash in ((average, "-"), (worst, (0, (1.5, 1.2)))):
            axes.plot([level] * 2, [row - 0.38, row + 0.38], color=INK, linewidth=1.4, linestyle=dash)
        text = f"mean {average:.3f}, worst decile {worst:.3f}"
        axes.annotate(text, (1, row), (10, 0), axes.get_yaxis_transform(), "offset points", va="center")
    axes.set_xlabel("accuracy on test samples of the client's own kind")
    return figure


@svg
def learning_curve(rounds: Sequence[Round], scores: Mapping[str, float | None], metric: str) -> Figure:
    """Draw validation scores by round, the final test score and the other stages' scores; below them, each round's training loss."""
    curve = {row.round: row.watched for row in rounds if row.watched is not None}
    tested = {row.round: row.score for row in rounds if row.score is not None and row.validation is not None}
    levels = {stage: score for stage in LOOKS if stage != "federated" and (score := scores.get(stage)) is not None}
    numbers, margin = [row.round for row in rounds], max(0.5, 0.02 * len(rounds))
    figure, dots = Figure((WIDTH, 4.9)), "D." if len(rounds) <= 60 else ("", "")
    loss = panel(figure, 0.55, 0.5, 1.5, 3.35, "training loss")
    axes = panel(figure, 0.55, 2.0, 1.5, 0.3, metric)
    loss.plot(numbers, [math.nan if row.loss is None else row.loss for row in rounds], color=INK, linewidth=1.1, marker=dots[1])
    axes.plot(list(curve), list(curve.values()), color=BLUE, linewidth=1.6, marker=dots[0], markersize=4.5)
    axes.plot(
        list(tested),
        list(tested.values()),
        color="white",
        linestyle="",
        marker="o",
        markersize=7,
        markeredgecolor=BLUE,
        markeredgewidth=1.8,
    )
    for stage, level in levels.items():
        axes.axhline(level, color=LOOKS[stage].color, linestyle=LOOKS[stage].dash, linewidth=1.2)
    if all(row.loss is None for row in rounds):
        loss.text(0.5, 0.5, "not recorded: private, withheld, or no client took a step", transform=loss.transAxes, ha="center", va="center")
        loss.set_yticks([])
    if not (curve or levels):
        axes.text(0.5, 0.5, "no round has been evaluated yet", transform=axes.transAxes, ha="center", va="center")
    _name_lines(axes, levels | ({"federated": list((tested or curve).values())[-1]} if curve else {}))
    for part in (axes, loss):
        part.set_xlim(numbers[0] - margin, numbers[-1] + margin)
        part.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        part.grid()
    axes.tick_params(labelbottom=False)
    loss.set_xlabel("round")
    return figure


def _name_lines(axes: Axes, levels: Mapping[str, float]) -> None:
    """Write each line's name at the right edge, with enough space between names."""
    axes.margins(y=0.08)
    low, high = axes.get_ylim()
    names = sorted(levels, key=levels.__getitem__)
    for name, height in zip(names, _spread([levels[name] for name in names], (high - low) / 14), strict=True):
        look, edge = LOOKS[name], axes.get_yaxis_transform()
        arrow = {"arrowstyle": "-", "color": look.color, "linewidth": 1, "linestyle": look.dash, "shrinkA": 2, "shrinkB": 0}
        axes.annotate(f"{look.name} {levels[name]:.3f}", (1, levels[name]), (1.04, height), edge, edge, arrow, va="center")


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Return ascending heights at least ``gap`` apart: the mean of pushing up from below and pushing down from above."""
    up = accumulate(heights, lambda last, height: max(height, last + gap))
    down = list(accumulate(reversed(heights), lambda last, height: min(height, last - gap)))
    return [(a + b) / 2 for a, b in zip(up, reversed(down), strict=True)]


@svg
def client_samples(clients: Sequence[Client]) -> Figure:
    """Draw two stacked bars per client: its samples by label, and by modalities."""
    named = len(clients) <= MAX_NAMED
    clients = clients if named else sorted(clients, key=lambda client: (-(client.num_samples or 0), client.id))
    labels = _groups([client.labels for client in clients], FILLS)
    modalities = _groups([client.modalities for client in clients], FILLS[::-1])
    height, legend = min(max(0.2 * len(clients), 0.6), 4.6), 0.4 + 0.18 * ((max(len(labels), len(modalities)) + 1) // 2)
    figure = Figure((WIDTH, 0.3 + height + legend))
    left = 1.25 if named else 0.35
    middle = (WIDTH + left) / 2
    first = panel(figure, left, legend, WIDTH - middle + 0.15, 0.3, "samples by label")
    second = panel(figure, middle + 0.15, legend, 0.1, 0.3, "samples by modalities")
    for axes, groups in ((first, labels), (second, modalities)):
        rows(axes, [client.id for client in clients] if named and axes is first else [])
        axes.set_ylim(len(clients) - 0.5, -0.5)
        _stack(axes, groups, 0.8 if named else 1.0)
        if groups:
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.3 / height), ncols=2, frameon=False, borderaxespad=0, borderpad=0)
        else:
            axes.text(0.5, 0.5, "unknown", transform=axes.transAxes, ha="center", va="center")
    if not named:
        first.set_ylabel(f"{len(clients)} clients, largest first", labelpad=12, rotation_mode="anchor")
    return figure


def _groups(clients: Sequence[Mapping[str, int]], fills: Sequence[str]) -> list[Group]:
    """Return counts per client by label, in the labels' order. Rare labels beyond ``MAX_GROUPS`` are summed as 'other'."""
    total: Counter[str] = Counter()
    for counts in clients:
        total.update(counts)
    ranked = sorted(total, key=lambda label: (-total[label], label))
    kept = sorted(ranked if len(ranked) <= MAX_GROUPS else ranked[: MAX_GROUPS - 1])
    looks = zip(kept, cycle(fills), cycle(HATCHES), strict=False)
    groups = [Group(short(label), [counts.get(label, 0) for counts in clients], fill, hatch) for label, fill, hatch in looks]
    if rest := set(ranked) - set(kept):
        groups.append(Group(f"other ({len(rest)} labels)", [sum(counts.get(label, 0) for label in rest) for counts in clients], PALE, ""))
    return groups


def _stack(axes: Axes, groups: Sequence[Group], thickness: float) -> None:
    """Stack the groups' bars end to end."""
    ends = np.cumsum([group.counts for group in groups] or [[0]], axis=0)
    for group, end in zip(groups, ends, strict=False):
        bars(axes, np.arange(len(end)), end - group.counts, end, group, thickness)
    axes.set_xlim(0, max(ends.max(initial=0) * 1.02, 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


@svg
def traffic(rounds: Sequence[Round]) -> Figure:
    """Draw the bytes of every round, up from the clients and down to them, and next to them the running total."""
    figure, numbers = Figure((WIDTH, 2.6)), [row.round for row in rounds]
    up, down = np.array([[row.bytes_up, row.bytes_down] for row in rounds], dtype=float).T
    reach, sent = max(up.max(), down.max(), 1), max((up + down).sum(), 1)
    (scale, unit), (total_scale, total_unit) = byte_unit(reach), byte_unit(sent)
    axes = panel(figure, 0.55, 0.5, 3.95, 0.3, f"per round, in {unit}")
    total = panel(figure, 6.2, 0.5, 0.1, 0.3, f"running total, in {total_unit}")
    thickness = 0.8 if len(rounds) <= 100 else 1.0
    bars(axes, numbers, np.zeros_like(up), up / scale, Group("up", [], BLUE, ""), thickness, upright=True)
    bars(axes, numbers, -down / scale, np.zeros_like(down), Group("down", [], ORANGE, "////"), thickness, upright=True)
    total.plot(numbers, np.cumsum(up + down) / total_scale, color=INK, linewidth=1.4, marker="." if len(rounds) <= 60 else "")
    axes.axhline(0, color=INK, linewidth=0.8)
    for text, share in (("↑ up", 0.75), ("↓ down", 0.25)):
        axes.annotate(text, (1, share), (8, 0), "axes fraction", "offset points", va="center")
    axes.set_ylim(-1.08 * reach / scale, 1.08 * reach / scale)
    total.set_ylim(0, 1.08 * sent / total_scale)
    for part in (axes, total):
        part.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
        part.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        part.yaxis.set_major_locator(MaxNLocator(5))
        part.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.3g}")
        part.set_xlabel("round")
        part.grid(axis="y")
    return figure


@svg
def times(steps: Mapping[str, float], stages: Mapping[str, float]) -> Figure:
    """Draw the seconds of the federated stage by step, and of the whole run by stage."""
    figure = Figure((WIDTH, 0.8 + 0.27 * max(len(steps), len(stages))))
    panels = (("federated run, by step", steps, 0.95, 5.1, ORANGE, "////"), ("whole run, by stage", stages, 5.55, 0.8, BLUE, ""))
    for title, seconds, left, right, color, hatch in panels:
        axes = panel(figure, left, 0.45, right, 0.3, title)
        rows(axes, list(seconds))
        values = np.array(list(seconds.values()))
        bars(axes, np.arange(len(values)), np.zeros_like(values), values, Group(title, [], color, hatch), 0.62)
        for row, value in enumerate(values):
            axes.annotate(duration(value), (value, row), (5, 0), "data", "offset points", va="center", fontsize=8.5)
        axes.set_xlim(0, max(values.max(initial=0), 1e-9) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("seconds")
    return figure
