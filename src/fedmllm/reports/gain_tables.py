"""Tables of a sweep report with differences between methods and their uncertainty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from statistics import mean

from fedmllm.evaluation.predictions import SIDE_BY_SIDE
from fedmllm.format import duration, human_bytes
from fedmllm.reports.drawing import LOOKS
from fedmllm.reports.run_report import METRICS
from fedmllm.reports.sweep_tables import BASELINES, NOTHING, Entry, Table, baseline, highest, percent
from fedmllm.sweeps.comparison import Gain, Sweep
from fedmllm.sweeps.pairs import Pair, acting, kinds
from fedmllm.sweeps.statistics import Interval, holm
from fedmllm.sweeps.trained import Column, Trained


def overview_table(sweep: Sweep) -> Table:
    """Return every method over all columns: mean, rank, gain over the first method, and the costs of a run."""
    ranks, best = sweep.ranks(), highest(sweep, ())
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
        f"Each method over all columns that it has. Above {sweep.reference}: mean difference in percentage points over the cells that both have. "
        f"{_doubt(gains)} Won: cells in which a method scored higher. Per run: bytes sent and received by all clients, and time of training and "
        "evaluation. Failures: answers that could not be parsed, over all runs."
    )
    header = ("", "mean", "rank", f"above {sweep.reference}", "95%", "won", "sent", "received", "time", "failures")
    return Table("overview", caption, header, tuple(rows))


def survivors(gains: Sequence[Gain | None]) -> list[bool]:
    """Return which differences of a table remain significant after Holm's correction over all of them."""
    return holm([gain.interval.p if gain and gain.interval else None for gain in gains])


def _doubt(gains: Sequence[Gain | None], over: str = "the rows of the table") -> str:
    """Return the sentences of a caption that explain the uncertainty of differences."""
    seeds = {gain.seeds for gain in gains if gain}
    if seeds <= {1}:
        return "With a single seed there are no intervals: any difference here may be due to chance."
    alone = " A difference from a single seed has no interval." if 1 in seeds else ""
    return (
        f"In parentheses or under 95%: the paired t interval over seeds, which includes the noise of the test samples.{alone} Bold: differences in "
        f"either direction that are significant at the 5% level after Holm's correction over {over}."
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
    """Return each method's gain over the same method without some of its strategies, in total and by kind of scenario; None without such a pair."""
    groups = kinds(sweep)
    owns = [acting(sweep, pair) for pair in found]
    everywhere = [own.gain(pair.method, pair.over) for own, pair in zip(owns, found, strict=True)]
    by_kind = [[own.gain(pair.method, pair.over, columns) for columns in groups.values()] for own, pair in zip(owns, found, strict=True)]
    marks = iter(survivors(list(chain(*by_kind))))
    rows = []
    for pair, gain, sure, gains in zip(found, everywhere, survivors(everywhere), by_kind, strict=True):
        rows.append((Entry(pair.label), *_gain_entries(gain, sure), *(_gain_entry(gain, next(marks)) for gain in gains)))
    caption = (
        "Gain of a method from strategies: mean difference in percentage points over the cells that have both; then the same by kind of scenario. "
        f"{_doubt([*everywhere, *chain(*by_kind)], 'the rows of the table (for kinds of scenario, over rows and kinds)')}"
        " Cells in which a strategy could have no effect are excluded."
    )
    return Table("strategies", caption, ("", "gain", "95%", "won", *groups), tuple(rows)) if rows else None


def beside_table(sweep: Sweep, model: str, dataset: str) -> Table | None:
    """Return accuracy, balanced accuracy and macro-F1 on a dataset, and each method's gains in them; None if the answers have no classes."""
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
        f"{dataset}, {model}: scores of the chosen options in percent, for methods that have all scenarios, and the difference to {sweep.reference} in "
        "percentage points over the cells that both have. A gain in only one of the three may come from a corrected prior instead of a better model. "
        f"{_doubt(list(gains['accuracy'].values()))}"
    )
    header = ("", *(name for metric in metrics for name in (METRICS[metric], f"above {sweep.reference}")))
    return Table(f"beside-{model}-{dataset}", caption, header, tuple(rows), (rule,))


def _gains(sweep: Sweep, columns: Sequence[Column]) -> dict[str, Gain | None]:
    """Return the gain over the first method, by method that has any of the columns."""
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
    """Return the mean over runs as text."""
    return wording(mean(map(of, cells)))
