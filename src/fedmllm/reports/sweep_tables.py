"""The tables of a sweep, for HTML, Markdown, CSV and LaTeX alike."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from itertools import chain
from statistics import mean

from fedmllm.evaluation.metrics import error_over_models
from fedmllm.evaluation.predictions import SIDE_BY_SIDE
from fedmllm.format import duration, human_bytes
from fedmllm.reports.drawing import LOOKS
from fedmllm.reports.run_report import METRICS
from fedmllm.run.results import worst_decile
from fedmllm.sweeps.comparison import Chosen, Column, Gain, Sweep, Trained
from fedmllm.sweeps.pairs import Pair, acting, kinds
from fedmllm.sweeps.statistics import Interval, holm

NOTHING = "\u2013"
"""Where there is no number."""
BASELINES = ("zero_shot", "local_mean", "calibrated_local_mean", "centralized", "calibrated_centralized", "ceiling")


@dataclass(frozen=True)
class Entry:
    """A cell of a table.

    Attributes:
        text: as printed.
        best: whether it is the highest of its column, which says nothing about chance; in italics.
        sure: whether it is a difference that survives Holm's correction; in bold.
    """

    text: str
    best: bool = False
    sure: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its file.
        caption: what it shows.
        header: of all columns, the first being the rows' names.
        rows: as many entries as the header has.
        rules: before which rows a line is drawn.
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    rules: tuple[int, ...] = ()


def percent(found: tuple[float, float | None] | None) -> str:
    """``81.2 (0.9)``: mean and standard error over seeds; a dash for nothing."""
    if found is None:
        return NOTHING
    value, error = found
    return f"{100 * value:.1f}" + ("" if error is None else f" ({100 * error:.1f})")


def score_table(sweep: Sweep, model: str, dataset: str) -> Table:
    """Methods and baselines by scenario, their mean, and the methods' mean rank."""
    columns = [column for column in sweep.columns if (column.model, column.dataset) == (model, dataset)]
    groups: list[Sequence[Column]] = [*([column] for column in columns), columns]
    best = [_best(sweep, group) for group in groups]
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
        f"{dataset}, {model}: {METRICS.get(metric, metric)} in percent, mean over seeds and in parentheses its standard error; "
        "the highest of a column in italics, whatever chance has to do with it. Rank: mean over the scenarios of a method's place, 1 for the best."
    )
    return Table(f"scores-{model}-{dataset}", caption, ("", *(column.scenario for column in columns), "mean", "rank"), tuple(rows), rules)


def hard_table(sweep: Sweep, model: str, dataset: str) -> Table | None:
    """The same of chosen options, to be read beside numbers published so; None for other metrics than the AUC."""
    chosen = {key: cell for key, cell in sweep.cells.items() if key[1][:2] == (model, dataset) and cell.result.metric == "auc"}
    if not chosen:
        return None
    hard: dict[tuple[str, Column, int], Trained] = {
        key: Chosen(c.method, c.column, c.seed, c.code, c.run, c.answers) for key, c in chosen.items()
    }
    table = score_table(replace(sweep, cells=hard), model, dataset)
    caption = (
        f"{dataset}, {model}: AUC in percent of the chosen options, 0 or 1, instead of their probabilities, as it is computed in the FedMLLM paper; "
        "an answer that could not be read counts against it. Mean and standard error as above."
    )
    return replace(table, name=f"hard-{model}-{dataset}", caption=caption)


def _best(sweep: Sweep, columns: Sequence[Column]) -> float | None:
    found = [entry[0] for method in sweep.methods if (entry := sweep.mean_and_error(method, columns))]
    return max(found, default=None)


def baseline(sweep: Sweep, key: str, columns: Sequence[Column]) -> tuple[float, float | None] | None:
    """Over seeds, the mean over columns of a baseline, which was trained beside any of the methods."""
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


def overview_table(sweep: Sweep) -> Table:
    """Every method over all columns: mean, rank, gain over the first, and what a run costs."""
    ranks, best = sweep.ranks(), _best(sweep, ())
    gains = [None if method == sweep.reference else sweep.gain(method) for method in sweep.methods]
    rows = []
    for method, gain, sure in zip(sweep.methods, gains, survivors(gains), strict=True):
        own = sweep.of(method)
        found = sweep.mean_and_error(method)
        entries = [
            Entry(percent(found), found is not None and found[0] == best),
            Entry(f"{ranks[method]:.1f}" if method in ranks else NOTHING),
            *_gain_entries(gain, sure),
            Entry(_spread(own, lambda cell: cell.result.bytes_up, human_bytes)),
            Entry(_spread(own, lambda cell: cell.result.bytes_down, human_bytes)),
            Entry(_spread(own, lambda cell: cell.result.seconds_by_stage.get("federated", 0.0), duration)),
            Entry(f"{sum(int(cell.result.details['federated'].get('failures', 0)) for cell in own):,}"),
        ]
        rows.append((Entry(method), *entries))
    caption = (
        f"All methods over all columns that each has. Above {sweep.reference}: mean difference in percentage points over the cells that both have. "
        f"{_doubt(gains)} Won: cells in which a method scored higher. Sent and received by all clients, and time of training and evaluation: of a "
        "run. Failures: answers that could not be read, over all runs."
    )
    header = ("", "mean", "rank", f"above {sweep.reference}", "95 %", "won", "sent", "received", "time", "failures")
    return Table("overview", caption, header, tuple(rows))


def survivors(gains: Sequence[Gain | None]) -> list[bool]:
    """Which differences of a table survive Holm's correction over all of them."""
    return holm([gain.interval.p if gain and gain.interval else None for gain in gains])


def _doubt(gains: Sequence[Gain | None], over: str = "the rows of the table") -> str:
    """Words for how sure differences are."""
    seeds = {gain.seeds for gain in gains if gain}
    if seeds <= {1}:
        return "There is one seed, hence no interval: nothing here can be told from chance."
    alone = " A difference of one seed has no interval." if 1 in seeds else ""
    return (
        f"In parentheses or under 95 %: the paired t interval over seeds, the noise of the test samples in it.{alone} In bold, in either direction: "
        f"what differs from nothing after Holm's correction over {over}, at 5 %."
    )


def _gain_entries(gain: Gain | None, sure: bool) -> list[Entry]:
    if gain is None:
        return [Entry("")] * 3
    return [
        Entry(f"{100 * gain.mean:+.1f}", sure=sure),
        Entry(_ends(gain.interval) if gain.interval else NOTHING),
        Entry(f"{gain.won} of {gain.cells}"),
    ]


def strategy_table(sweep: Sweep, found: Sequence[Pair]) -> Table | None:
    """Each method above the same without some of its strategies: everywhere, and by kind of scenario; None where there is no such pair."""
    groups = kinds(sweep)
    owns = [acting(sweep, pair) for pair in found]
    everywhere = [own.gain(pair.method, pair.over) for own, pair in zip(owns, found, strict=True)]
    by_kind = [[own.gain(pair.method, pair.over, columns) for columns in groups.values()] for own, pair in zip(owns, found, strict=True)]
    marks = iter(survivors(list(chain(*by_kind))))
    rows = []
    for pair, gain, sure, gains in zip(found, everywhere, survivors(everywhere), by_kind, strict=True):
        rows.append((Entry(pair.label), *_gain_entries(gain, sure), *(_gain_entry(gain, next(marks)) for gain in gains)))
    caption = (
        "What strategies add to a method: mean difference in percentage points over the cells that have both; then the same by kind of scenario. "
        f"{_doubt([*everywhere, *chain(*by_kind)], 'the rows of the table; of the kinds, over the rows and kinds')}"
        " Cells in which a strategy could do nothing are left out."
    )
    return Table("strategies", caption, ("", "gain", "95 %", "won", *groups), tuple(rows)) if rows else None


def beside_table(sweep: Sweep, model: str, dataset: str) -> Table | None:
    """Accuracy, balanced accuracy and macro-F1 of a dataset, and what each method gains in them; None where answers do not say a class."""
    columns = [column for column in sweep.columns if (column.model, column.dataset) == (model, dataset)]
    metrics = {metric: sweep.by(metric) for metric in SIDE_BY_SIDE}
    metrics = {metric: scored for metric, scored in metrics.items() if any(scored.of(method, columns) for method in sweep.methods)}
    if len(metrics) < len(SIDE_BY_SIDE):
        return None
    rows = [
        (Entry(LOOKS[key].name), *(entry for level in levels for entry in (Entry(percent(level)), Entry(""))))
        for key in BASELINES
        if any(levels := [baseline(scored, key, columns) for scored in metrics.values()])
    ]
    rule, gains = len(rows), {metric: _gains(scored, columns) for metric, scored in metrics.items()}
    marks = {metric: survivors(list(found.values())) for metric, found in gains.items()}
    for place, method in enumerate(gains["accuracy"]):
        entries = []
        for metric, scored in metrics.items():
            level, gain = scored.mean_and_error(method, columns), gains[metric][method]
            entries += [Entry(percent(level)), _gain_entry(gain, marks[metric][place]) if gain else Entry("")]
        rows.append((Entry(method), *entries))
    caption = (
        f"{dataset}, {model}: by the chosen options, in percent over the scenarios that a method has all of, and above {sweep.reference} in percentage "
        "points over the cells that both have; a gain in one of the three alone may be a prior removed rather than a better model. "
        f"{_doubt(list(gains['accuracy'].values()))}"
    )
    header = ("", *(name for metric in metrics for name in (METRICS[metric], f"above {sweep.reference}")))
    return Table(f"beside-{model}-{dataset}", caption, header, tuple(rows), (rule,))


def _gains(sweep: Sweep, columns: Sequence[Column]) -> dict[str, Gain | None]:
    """By method that has any of the columns, over the first one."""
    own = [method for method in sweep.methods if sweep.of(method, columns)]
    return {method: None if method == sweep.reference else sweep.gain(method, columns=columns) for method in own}


def _gain_entry(gain: Gain | None, sure: bool) -> Entry:
    if gain is None:
        return Entry(NOTHING)
    ends = f" ({_ends(gain.interval)})" if gain.interval else ""
    return Entry(f"{100 * gain.mean:+.1f}{ends}", sure=sure)


def _ends(interval: Interval) -> str:
    return f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def _spread(cells: Sequence[Trained], of: Callable[[Trained], float], wording: Callable[[float], str]) -> str:
    """The mean over runs."""
    return wording(mean(map(of, cells)))


def client_table(sweep: Sweep) -> Table | None:
    """Accuracy on samples of each client's own kind by method; None where no run asked for it."""
    rows = []
    for method in sweep.methods:
        own = [
            list(cell.result.clients["federated"].values()) for cell in sweep.of(method, sweep.shared) if "federated" in cell.result.clients
        ]
        if own:
            numbers = (mean(map(mean, own)), mean(map(worst_decile, own)), mean(max(scores) - min(scores) for scores in own))
            rows.append((Entry(method), *(Entry(f"{100 * number:.1f}") for number in numbers), Entry(str(len(own)))))
    caption = (
        "Accuracy in percent on test samples of each client's own kind: mean and worst decile over the clients, and the range, averaged over runs"
        f"{_where(sweep)}."
    )
    return Table("clients", caption, ("", "mean", "worst decile", "range", "runs"), tuple(rows)) if rows else None


def _where(sweep: Sweep) -> str:
    """Words for the columns that all methods have, where they are not all."""
    count, shared = len(sweep.columns), sweep.shared
    kept = list(dict.fromkeys(column.scenario for column in shared))
    return "" if len(shared) == count else f" of the {len(shared)} of {count} columns that all methods have ({', '.join(kept)})"


def tested_table(sweep: Sweep) -> Table | None:
    """The final models where a modality is missing, or worse, when they are used; None where no run asked for it."""
    copies = list(dict.fromkeys(copy for cell in sweep.cells.values() for copy in cell.result.tested))
    rows = []
    for method in sweep.methods:
        own = [cell for cell in sweep.of(method, sweep.shared) if cell.result.tested]
        if own:
            numbers = [[c.result.tested[copy]["score"] for c in own if copy in c.result.tested] for copy in copies]
            whole = mean(cell.score for cell in own)
            rows.append((Entry(method), Entry(f"{100 * whole:.1f}"), *(Entry(f"{100 * mean(n):.1f}" if n else NOTHING) for n in numbers)))
    caption = (
        "Scores in percent of the final models on copies of the test split with only these modalities, or altered, averaged over runs"
        f"{_where(sweep)}."
    )
    return Table("tested", caption, ("", "complete", *copies), tuple(rows)) if rows else None


def to_markdown(table: Table) -> str:
    """A table of GitHub's Markdown."""
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
    """A ``table`` with the rules of the package booktabs."""
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
    """A line for each cell, its numbers in full."""
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
