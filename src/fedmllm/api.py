"""What a program calls: training, sweeps, reports, and trained adapters at work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedmllm.config import Experiment
from fedmllm.engine.observer import UNOBSERVED, Observer
from fedmllm.reports import write_report_of
from fedmllm.reports.progress import Display, SweepDisplay
from fedmllm.reports.run_report import write_report
from fedmllm.reports.sweep_report import write_sweep_report
from fedmllm.run.resident import Resident
from fedmllm.run.results import RunResult
from fedmllm.run.scoring import Adapter, load_adapter_of, score_adapter
from fedmllm.run.train import train as run
from fedmllm.sweeps.grid import cells, load_grid
from fedmllm.sweeps.runner import Outcome, open_sweep, require_sources, run_sweep
from fedmllm.types import Metrics, Prediction


def train(
    experiment: Experiment,
    output: str | Path | None = None,
    *,
    name: str = "experiment",
    resume: bool = False,
    observer: Observer | None = None,
    resident: Resident | None = None,
    report: bool = True,
    track: Sequence[str] = (),
    force: bool = False,
    progress: bool | None = None,
) -> RunResult:
    """Run an experiment: zero-shot, the federation, the baselines asked for; then adapter, result and report.

    Nothing is written before settings, data and model have been found good.

    Args:
        experiment: what to run.
        output: the run folder; by default ``runs/<name>-<time>``, on resuming the newest of those that is unfinished.
        name: names the experiment in the report.
        resume: go on with an interrupted run; the end is bit-identical to that of an uninterrupted one.
        observer: functions to call as the run proceeds. With an observer there is no display.
        resident: what earlier runs of this process left to be used again; nothing for None.
        report: whether to write the report; ``fedmllm.report`` writes it any time.
        track: where to write the numbers down besides, names of ``run.tracking.TRACKERS``.
        force: go on although the model is another than the run began with.
        progress: whether to show rounds as they finish; None for in terminals and notebooks.

    Returns:
        the result, which knows its run folder.

    Raises:
        FedMLLMError: see the kinds in ``fedmllm.errors``.
    """
    opened: list[Path] = []

    def note(folder: Path) -> None:
        opened.append(folder)
        seen.opened(folder)

    with ExitStack() as stack:
        if observer is None and _shows(progress):
            observer = stack.enter_context(Display(experiment.federation.num_rounds)).observer
        seen = observer or UNOBSERVED
        told = replace(seen, opened=note)
        result = run(experiment, output, name=name, resume=resume, observer=told, resident=resident, track=track, force=force)
        if report:
            write_report(opened[-1])
    return replace(result, folder=opened[-1])


def load_adapter(
    run_or_adapter: str | Path, experiment: str | Path | None = None, overrides: Sequence[str] = (), *, force: bool = False
) -> Adapter:
    """Load a trained adapter on its model.

    Args:
        run_or_adapter: a run folder, or a PEFT adapter folder.
        experiment: file that names model and data, for an adapter outside a run folder.
        overrides: settings as ``key.path=value``, e.g. where the data are now.
        force: take the model although it is another than the run's.

    Raises:
        RunError: if neither the folder nor the arguments say which experiment it is.
        ModelError: if the model is another than the run's, or the adapter does not fit.
    """
    return load_adapter_of(Path(run_or_adapter), None if experiment is None else Path(experiment), overrides, force)


def evaluate(
    run_or_adapter: str | Path, experiment: str | Path | None = None, overrides: Sequence[str] = (), *, force: bool = False
) -> Metrics:
    """Return all metrics of a trained adapter on its experiment's test split; arguments and errors as of ``load_adapter``."""
    return score_adapter(Path(run_or_adapter), None if experiment is None else Path(experiment), overrides, force)[1]


def predict(run_or_adapter: str | Path, questions: Sequence[Mapping[str, Any]], experiment: str | Path | None = None) -> list[Prediction]:
    """Return a trained adapter's answers; ``Adapter.predict`` says what a question is. To ask several times, use ``load_adapter``."""
    return load_adapter(run_or_adapter, experiment).predict(questions)


def sweep(grid: str | Path, output: str | Path, *, jobs: int = 1, progress: bool | None = None) -> list[Outcome]:
    """Train every experiment of a grid that is not trained yet, then write the sweep's report.

    Args:
        grid: file of the grid.
        output: the sweep's folder; the same call goes on where an earlier one stopped.
        jobs: processes, each with a model of its own.
        progress: whether to print a line for each experiment that ends; None for in terminals and notebooks.

    Returns:
        what was trained by this call, in the order in which it ended; one that failed has no score and says why.

    Raises:
        ConfigError, RunError: if the grid or the folder cannot be used; nothing is trained then.
    """
    whole, folder = load_grid(Path(grid)), Path(output)
    every = cells(whole)
    require_sources(every, Path(grid))
    open_sweep(whole, folder)
    outcomes = run_sweep(every, folder, jobs, ended=SweepDisplay(every, folder, jobs).ended if _shows(progress) else lambda outcome: None)
    if all(outcome.score is not None for outcome in outcomes):
        write_sweep_report(folder)
    return outcomes


def report(folder: str | Path) -> Path:
    """Write the report of a run or a sweep, and return its page.

    Raises:
        RunError: if the folder is neither, or its files are damaged.
    """
    return write_report_of(Path(folder))


def _shows(progress: bool | None) -> bool:
    console = Console()
    return console.is_terminal or console.is_jupyter if progress is None else progress
