"""The functions of the Python API: training, sweeps, reports, and the use of trained adapters."""

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
from fedmllm.run.audit import audit as audit_run
from fedmllm.run.audit import runs_of
from fedmllm.run.audit_result import AuditResult, AuditUnit
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
    """Run an experiment: zero-shot, the federation and the requested baselines. Then write the adapter, the result and the report.

    Settings, data and model are checked before anything is written.

    Args:
        experiment: the experiment to run.
        output: the run folder. The default is ``runs/<name>-<time>`` or, with ``resume``, the newest unfinished folder of that form.
        name: the experiment's name in the report.
        resume: whether to continue an interrupted run. The result is bit-identical to that of an uninterrupted run.
        observer: callbacks that report the run's progress. With an observer there is no display.
        resident: caches that earlier runs of this process have filled; None for new ones.
        report: whether to write the report. ``fedmllm.report`` can also write it later.
        track: names of the trackers that receive the metrics, from ``run.tracking.TRACKERS``.
        force: accept the model even if it is not the one that the run started with.
        progress: whether to show rounds as they finish. None shows them in terminals and notebooks only.

    Returns:
        the result, with its run folder.

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
        noting = replace(seen, opened=note)
        result = run(experiment, output, name=name, resume=resume, observer=noting, resident=resident, track=track, force=force)
        if report:
            write_report(opened[-1])
    return replace(result, folder=opened[-1])


def load_adapter(
    run_or_adapter: str | Path, experiment: str | Path | None = None, overrides: Sequence[str] = (), *, force: bool = False
) -> Adapter:
    """Load a trained adapter and its model.

    Args:
        run_or_adapter: a run folder, or a PEFT adapter folder.
        experiment: the file that names model and data, for an adapter outside a run folder.
        overrides: settings as ``key.path=value``, e.g. the data's current location.
        force: accept the model even if it is not the run's.

    Raises:
        RunError: if no experiment is given or found.
        ModelError: if the model is not the run's, or the adapter does not fit it.
    """
    return load_adapter_of(Path(run_or_adapter), None if experiment is None else Path(experiment), overrides, force)


def evaluate(
    run_or_adapter: str | Path, experiment: str | Path | None = None, overrides: Sequence[str] = (), *, force: bool = False
) -> Metrics:
    """Return all metrics of a trained adapter on its experiment's test split. Arguments and errors are those of ``load_adapter``."""
    return score_adapter(Path(run_or_adapter), None if experiment is None else Path(experiment), overrides, force)[1]


def predict(run_or_adapter: str | Path, questions: Sequence[Mapping[str, Any]], experiment: str | Path | None = None) -> list[Prediction]:
    """Return a trained adapter's answers to questions as in ``Adapter.predict``. For several calls, load the adapter once with ``load_adapter``."""
    return load_adapter(run_or_adapter, experiment).predict(questions)


def sweep(grid: str | Path, output: str | Path, *, jobs: int = 1, progress: bool | None = None) -> list[Outcome]:
    """Train all experiments of a grid that are not trained yet. If none fails, write the sweep's report.

    Args:
        grid: the file of the grid.
        output: the sweep folder. After an interruption, the same call continues.
        jobs: number of processes. Each loads its own model.
        progress: whether to print a line for each finished experiment. None prints them in terminals and notebooks only.

    Returns:
        the outcomes of this call, in the order in which the experiments ended. A failed experiment has no score, and its outcome has the error.

    Raises:
        ConfigError, RunError: if the grid or the folder cannot be used. Nothing is trained then.
    """
    whole, folder = load_grid(Path(grid)), Path(output)
    every = cells(whole)
    require_sources(every, Path(grid))
    open_sweep(whole, folder)
    outcomes = run_sweep(every, folder, jobs, ended=SweepDisplay(every, folder, jobs).ended if _shows(progress) else lambda outcome: None)
    if all(outcome.score is not None for outcome in outcomes):
        write_sweep_report(folder)
    return outcomes


def audit(
    run_or_sweep: str | Path, unit: AuditUnit | None = None, *, seed: int = 0, progress: bool | None = None
) -> dict[str, AuditResult]:
    """Train the twin of a run, or of each run of a sweep, on a random half of its data, and test how well attacks tell which half.

    Then write the report. The results are in each run's ``audit/``; an interrupted audit continues, and a finished one is not repeated.

    Args:
        run_or_sweep: the folder of a finished run, or of a sweep.
        unit: what an attacker looks for, ``sample`` or ``client``; by default what the run protects, and samples if it protects nothing.
        seed: the seed of the coins that decide who is in the twin.
        progress: whether to show the twins' rounds as they finish. None shows them in terminals and notebooks only.

    Returns:
        the results by the name of the run folder.

    Raises:
        RunError: if the folder is not a finished run or a sweep with one, or an audit was begun with another unit or seed.
        ConfigError: if the run's data are at sites.
    """
    held, found = Resident(), dict[str, AuditResult]()
    for folder in runs_of(Path(run_or_sweep)):
        with ExitStack() as stack:
            observer = stack.enter_context(Display(1)).observer if _shows(progress) else UNOBSERVED
            found[folder.resolve().name] = audit_run(folder, unit, seed=seed, observer=observer, resident=held)
        write_report(folder)
    report(run_or_sweep)
    return found


def report(folder: str | Path) -> Path:
    """Write the report of a run or a sweep, and return the path of its page.

    Raises:
        RunError: if the folder is neither, or its files are damaged.
    """
    return write_report_of(Path(folder))


def _shows(progress: bool | None) -> bool:
    console = Console()
    return console.is_terminal or console.is_jupyter if progress is None else progress
