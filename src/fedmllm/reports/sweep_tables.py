"""Tables of a sweep report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from fedmllm.evaluation.metrics import error_over_models
from fedmllm.reports.drawing import LOOKS
from fedmllm.reports.run_report import METRICS
from fedmllm.run.results import worst_decile
from fedmllm.sweeps.comparison import Sweep
from fedmllm.sweeps.trained import Chosen, Column, Trained

NOTHING = "\u2013"
"""Text of an entry without a number."""
BASELINES = ("zero_shot", "local_mean", "calibrated_local_mean", "centralized", "calibrated_centralized", "ceiling")


@dataclass(frozen=True)
class Entry:
    """A cell of a table.

    Attributes:
        text: the text of the entry.
        best: whether the number is the highest of its column, printed in italics. That does not mean that it is significant.
        sure: whether the number is a difference that remains significant after Holm's correction, printed in bold.
    """

    text: str
    best: bool = False
    sure: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: the name in labels and in the page's code.
        caption: the caption.
        header: names of the columns; the first column holds the rows' names.
        rows: the rows, with as many entries as the header.
        rules: indices of rows above which a line is drawn.
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    rules: tuple[int, ...] = ()


def percent(found: tuple[float, float | None] | None) -> str:
    """Return mean and standard error in percent, such as ``81.2 (0.9)``; a dash for None."""
    if found is None:
        return NOTHING
    value, error = found
    return f"{100 * value:.1f}" + ("" if error is None else f" ({100 * error:.1f})")


def score_table(sweep: Sweep, model: str, dataset: str) -> Table:
    """Return the scores of methods and baselines by scenario, their mean, and the methods' mean rank."""
    columns = [column for column in sweep.columns if (column.model, column.dataset) == (model, dataset)]
    groups: list[Sequence[Column]] = [*([column] for column in columns), columns]
    best = [highest(sweep, group) for group in groups]
    ranks = sweep.ranks(columns)
    lowest = min(ranks.values(), default=0.0)
    rows = []
    for key in BASELINES:
        if any(baseline(sweep, key, group) for group in groups):
            rows.append((Entry(LOOKS[key].name), *(Entry(percent(baseline(sweep, key, group))) for group in groups), Entry("")))
    rule = len(rows)
    for method in sweep.methods:
        found = [sweep.mean_and_error(method, group) for group in groups]
        if any(found):
            entries = (Entry(percent(f), f is not None and f[0] == top) for f, top in zip(found, best, strict=True))
            rank = Entry(f"{ranks[method]:.1f}", ranks[method] == lowest) if method in ranks else Entry(NOTHING)
            rows.append((Entry(method), *entries, rank))
    published = sweep.published.get(dataset, {})
    rules = (rule, len(rows)) if published else (rule,)
    for method, numbers in published.items():
        shown = [numbers.get(column.scenario) for column in columns]
        known = [number for number in shown if number is not None]
        texts = [NOTHING if number is None else f"{number:.1f}" for number in (*shown, mean(known) if len(known) == len(shown) else None)]
        rows.append((Entry(f"{method}, published"), *map(Entry, texts), Entry("")))
    metric = next(cell.run.manifest.metric for cell in sweep.cells.values() if cell.column in columns)
    caption = (
        f"{dataset}, {model}: {METRICS.get(metric, metric)} in percent, mean over seeds with its standard error in parentheses. "
        "Italics: the highest value of a column, which may be due to chance. Rank: a method's mean place over the scenarios, 1 for the best."
    )
    return Table(f"scores-{model}-{dataset}", caption, ("", *(column.scenario for column in columns), "mean", "rank"), tuple(rows), rules)


def hard_table(sweep: Sweep, model: str, dataset: str) -> Table | None:
    """Return the score table with the AUC of chosen options, for comparison with results published that way; None for other metrics."""
    chosen = {key: cell for key, cell in sweep.cells.items() if key[1][:2] == (model, dataset) and cell.result.metric == "auc"}
    if not chosen:
        return None
    hard: dict[tuple[str, Column, int], Trained] = {
        key: Chosen(c.method, c.column, c.seed, c.code, c.run, c.answers) for key, c in chosen.items()
    }
    table = score_table(replace(sweep, cells=hard), model, dataset)
    caption = (
        f"{dataset}, {model}: AUC in percent, computed from the chosen options (0 or 1) instead of their probabilities, as in the FedMLLM paper. "
        "An answer that could not be parsed counts as wrong. Mean and standard error as above."
    )
    return replace(table, name=f"hard-{model}-{dataset}", caption=caption)


def highest(sweep: Sweep, columns: Sequence[Column]) -> float | None:
    """Return the highest mean score of a method over columns; None if no method has them all."""
    found = [entry[0] for method in sweep.methods if (entry := sweep.mean_and_error(method, columns))]
    return max(found, default=None)


def baseline(sweep: Sweep, key: str, columns: Sequence[Column]) -> tuple[float, float | None] | None:
    """Return mean and standard error over seeds of a baseline's mean over columns. It may have been trained in the run of any method."""
    by_seed = []
    for seed in sweep.seeds:
        found = [
            next(
                (s for m in sweep.methods if (c := sweep.cells.get((m, column, seed))) and (s := c.baseline(key)) is not None),
                None,
            )
            for column in columns
        ]
        if all(score is not None for score in found):
            by_seed.append(mean(score for score in found if score is not None))
    return (mean(by_seed), error_over_models(by_seed)) if by_seed else None


def client_table(sweep: Sweep) -> Table | None:
    """Return the accuracy on samples of each client's own kind, by method; None if no run measured it."""
    rows = []
    for method in sweep.methods:
        own = [
            list(cell.result.clients["federated"].values()) for cell in sweep.of(method, sweep.shared) if "federated" in cell.result.clients
        ]
        if own:
            numbers = (mean(map(mean, own)), mean(map(worst_decile, own)), mean(max(scores) - min(scores) for scores in own))
            rows.append((Entry(method), *(Entry(f"{100 * number:.1f}") for number in numbers), Entry(str(len(own)))))
    caption = (
        "Accuracy in percent on test samples of each client's own kind: mean, worst decile and range over the clients, averaged over runs"
        f"{_where(sweep)}."
    )
    return Table("clients", caption, ("", "mean", "worst decile", "range", "runs"), tuple(rows)) if rows else None


def _where(sweep: Sweep) -> str:
    """Return the part of a caption that names the columns that all methods have; empty if these are all columns."""
    count, shared = len(sweep.columns), sweep.shared
    kept = list(dict.fromkeys(column.scenario for column in shared))
    return "" if len(shared) == count else f" of the {len(shared)} of {count} columns that all methods have ({', '.join(kept)})"


def tested_table(sweep: Sweep) -> Table | None:
    """Return the final models' scores on copies of the test split with missing or corrupted modalities; None if no run measured them."""
    copies = list(dict.fromkeys(copy for cell in sweep.cells.values() for copy in cell.result.tested))
    rows = []
    for method in sweep.methods:
        own = [cell for cell in sweep.of(method, sweep.shared) if cell.result.tested]
        if own:
            numbers = [[c.result.tested[copy]["score"] for c in own if copy in c.result.tested] for copy in copies]
            whole = mean(cell.score for cell in own)
            rows.append((Entry(method), Entry(f"{100 * whole:.1f}"), *(Entry(f"{100 * mean(n):.1f}" if n else NOTHING) for n in numbers)))
    caption = (
        "Scores in percent of the final models on copies of the test split with only the named modalities or with the named corruption, averaged over "
        "runs"
        f"{_where(sweep)}."
    )
    return Table("tested", caption, ("", "complete", *copies), tuple(rows)) if rows else None
