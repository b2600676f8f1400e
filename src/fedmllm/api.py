"""What a program calls: a run with its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedmllm.config import Experiment
from fedmllm.engine.observer import UNOBSERVED, Observer
from fedmllm.report.run_report import write_report
from fedmllm.run.resident import Resident
from fedmllm.run.results import RunResult
from fedmllm.run.train import train as run


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
) -> RunResult:
    """Run an experiment: zero-shot, the federation, the baselines asked for; then adapter, result and report.

    Nothing is written before settings, data and model have been found good.

    Args:
        experiment: what to run.
        output: the run folder; by default ``runs/<name>-<time>``, on resuming the newest of those that is unfinished.
        name: names the experiment in the report.
        resume: go on with an interrupted run; the end is bit-identical to that of an uninterrupted one.
        observer: told about the progress.
        resident: what earlier runs of this process left to be used again; nothing for None.
        report: whether to write the report; ``fedmllm report`` writes it any time.
        track: where to write the numbers down besides, names of ``run.tracking.TRACKERS``.
        force: go on although the model is another than the run began with.

    Raises:
        FedMLLMError: see the kinds in ``fedmllm.errors``.
    """
    told, opened = observer or UNOBSERVED, list[Path]()

    def note(folder: Path) -> None:
        opened.append(folder)
        told.opened(folder)

    seen = replace(told, opened=note)
    result = run(experiment, output, name=name, resume=resume, observer=seen, resident=resident, track=track, force=force)
    if report:
        write_report(opened[-1])
    return result
