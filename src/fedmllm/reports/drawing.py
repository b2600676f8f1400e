"""Drawing of the reports' figures: style, panels, bars, and SVG for an HTML page.

Colors are those of Okabe and Ito (2008), which color-blind readers can distinguish. Markers, dashes and hatches make figures readable in gray.
The same numbers give the same bytes: there is no date and no random id.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import unwrap
from io import StringIO
from pathlib import Path
from typing import NamedTuple, ParamSpec

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.style import context
from numpy.typing import ArrayLike

WIDTH = 8.96  # inches: the page's column of 860 CSS pixels, so that a point of a figure is a point of the page
INK, GRAY, PALE = "#222222", "#8a8a8a", "#c8c8c8"
BLUE, ORANGE, GREEN, YELLOW, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#56B4E9"
FILLS = (BLUE, YELLOW, VERMILION, SKY, PURPLE, GREEN, ORANGE)
HATCHES = ("", "////", "||", "\\\\\\\\")  # no dots, which make huge files; with seven fills they give 28 distinct looks
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "fedmllm", "text.parse_math": False, "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "legend.fontsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.titlelocation": "left", "axes.titlepad": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.linewidth": 0.6, "axes.edgecolor": GRAY, "text.color": INK, "axes.labelcolor": INK, "xtick.color": GRAY, "ytick.color": GRAY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "xtick.major.size": 3, "ytick.major.size": 3, "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6, "hatch.linewidth": 0.6, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
Arguments = ParamSpec("Arguments")


class Look(NamedTuple):
    """The name and style of a stage, the same in every figure."""

    name: str
    color: str
    marker: str
    dash: str | tuple[int, tuple[int, ...]]


LOOKS = {
    "zero_shot": Look("zero-shot", GRAY, "o", (0, (1, 2))),
    "local_mean": Look("local mean", VERMILION, "s", (0, (5, 2))),
    "calibrated_local_mean": Look("calibrated local mean", ORANGE, "p", (0, (5, 2, 1, 2))),
    "federated": Look("federated", BLUE, "D", "-"),
    "fine_tuned_mean": Look("fine-tuned mean", PURPLE, "P", (0, (3, 1, 1, 1, 1, 1))),
    "centralized": Look("centralized", GREEN, "^", (0, (6, 2, 1, 2))),
    "calibrated_centralized": Look("calibrated centralized", SKY, "h", (0, (6, 2, 1, 2, 1, 2))),
    "ceiling": Look("ceiling", INK, "v", (0, (10, 3))),
}

MODELS = {
    "local": LOOKS["local_mean"]._replace(name="local"),
    "federated": LOOKS["federated"],
    "fine_tuned": LOOKS["fine_tuned_mean"]._replace(name="fine-tuned"),
}
"""Kinds of models that are scored on each client's own kind of samples, by the keys of ``RunResult.clients``."""


class Group(NamedTuple):
    """Counts per client of one label, or of all rare labels together."""

    name: str
    counts: list[int]
    color: str
    hatch: str


def short(label: str, width: int = 20) -> str:
    """Return a label in one line of at most ``width`` characters. The middle is cut out, because labels often differ at their ends."""
    line = " ".join(label.split()) or "(none)"
    return line if len(line) <= width else f"{line[: width // 2].rstrip()}…{line[len(line) - (width - 1) // 2 :].lstrip()}"


def svg(draw: Callable[Arguments, Figure]) -> Callable[Arguments, Markup]:
    """Decorate a drawing function to use the reports' style instead of the user's matplotlib settings, and to return SVG."""

    @wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Markup:
        with context(["default", STYLE]), warnings.catch_warnings():
            # The browser draws the text, so missing glyphs in matplotlib's font do not matter.
            warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")
            buffer = StringIO()
            draw(*args, **kwargs).savefig(buffer, format="svg", metadata={"Date": None})
        return _inline(buffer.getvalue(), draw.__name__.replace("_", "-"))

    return drawn


def write_picture(path: Path, drawn: Callable[Arguments, Markup], *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
    """Write the figure of a function decorated with ``svg`` to a file, on white. The file's extension sets the format, e.g. PNG."""
    with context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from font")
        unwrap(drawn)(*args, **kwargs).savefig(path, dpi=150, facecolor="white")


def _inline(document: str, name: str) -> Markup:
    """Return only the ``<svg>`` element, with unique ids, because several figures share a page. Text stays unchanged."""
    body = re.sub(r"<metadata>.*?</metadata>", "", document[document.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda tag: re.sub(r'(\sid="|url\(#|href="#)', rf"\1{name}-", tag[0]), body)
    return Markup(body.strip().replace("<svg ", f'<svg role="img" aria-labelledby="{name}-caption" ', 1))


def panel(figure: Figure, left: float, bottom: float, right: float, top: float, title: str = "") -> Axes:
    """Add axes with margins in inches, so that panels of different figures line up."""
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height), title=title)


def rows(axes: Axes, labels: Sequence[str]) -> None:
    """Set up one row per label, the first on top."""
    axes.set_yticks(range(len(labels)), [short(label) for label in labels])
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def bars(axes: Axes, at: ArrayLike, low: ArrayLike, high: ArrayLike, group: Group, thickness: float, upright: bool = False) -> None:
    """Draw bars from low to high as one shape, so that hundreds of clients still make a small file."""
    ends = np.stack(np.broadcast_arrays(low, high, high, low, low))
    sides = np.asarray(at) + np.array([[-1], [-1], [1], [1], [-1]]) * thickness / 2
    corners = np.stack((sides, ends) if upright else (ends, sides), axis=-1).swapaxes(0, 1).reshape(-1, 2)
    codes = np.tile([Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY], ends.shape[1])
    lines = "#ffffff" if group.color in (BLUE, VERMILION, GREEN) else "#555555"
    # A legend skips names that start with an underscore.
    name = f" {group.name}" if group.name.startswith("_") else group.name
    axes.add_patch(PathPatch(Outline(corners, codes), facecolor=group.color, edgecolor=lines, linewidth=0, hatch=group.hatch, label=name))
