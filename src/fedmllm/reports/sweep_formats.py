"""Tables of a sweep report as Markdown and LaTeX, and its cells as CSV."""

from __future__ import annotations

import csv
from io import StringIO

from fedmllm.evaluation.predictions import SIDE_BY_SIDE
from fedmllm.reports.sweep_tables import BASELINES, NOTHING, Entry, Table
from fedmllm.sweeps.comparison import Sweep


def to_markdown(table: Table) -> str:
    """Return a table in GitHub's Markdown."""
    lines = [f"| {' | '.join(table.header)} |", "|---" + "|---:" * (len(table.header) - 1) + "|"]
    lines += [f"| {' | '.join(_marked(e) for e in row)} |" for row in table.rows]
    return "\n".join(lines) + f"\n\n{table.caption}\n"


def _marked(entry: Entry) -> str:
    text = entry.text.replace("|", "/")
    return f"**{text}**" if entry.sure else f"*{text}*" if entry.best else text


_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    NOTHING: "--",
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def _marked_in_latex(entry: Entry) -> str:
    text = _latex(entry.text)
    return rf"\textbf{{{text}}}" if entry.sure else rf"\textit{{{text}}}" if entry.best else text


def to_latex(table: Table) -> str:
    """Return a LaTeX ``table`` with the rules of the package booktabs."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(table.caption)}}}", rf"\label{{tab:{table.name}}}"]
    lines += [
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        " & ".join(map(_latex, table.header)) + r" \\",
        r"\midrule",
    ]
    for i, row in enumerate(table.rows):
        lines += [r"\midrule"] if i and i in table.rules else []
        lines.append(" & ".join(map(_marked_in_latex, row)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def to_csv(sweep: Sweep) -> str:
    """Return CSV with a line per cell and all digits of its numbers."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("model", "dataset", "scenario", "method", "seed", "metric", "score", "standard_error", *SIDE_BY_SIDE, *BASELINES)
    writer.writerow((*names, "bytes_up", "bytes_down", "seconds", "failures", "num_samples", "code"))
    beside = {metric: sweep.by(metric).cells for metric in SIDE_BY_SIDE}
    for (method, column, seed), cell in sorted(sweep.cells.items()):
        result, details = cell.result, cell.result.details["federated"]
        others = (beside[metric].get((method, column, seed)) for metric in SIDE_BY_SIDE)
        scores = (
            cell.score,
            result.standard_errors["federated"],
            *(other and other.score for other in others),
            *map(cell.baseline, BASELINES),
        )
        costs = (result.bytes_up, result.bytes_down, result.seconds_by_stage["federated"], details["failures"], details["num_samples"])
        writer.writerow((*column, method, seed, result.metric, *scores, *costs, cell.code))
    return text.getvalue()
