"""The command line: parse, call, print.

Heavy imports stay inside the commands, behind what can be refused without them: ``--help``, a listing or a mistyped path answers at once.
"""

from __future__ import annotations

import errno
import io
import json
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmllm.cli.adapters import chat, evaluate, merge
from fedmllm.cli.arguments import AsJson, ExperimentFile, Force, Overrides, loaded
from fedmllm.cli.data import data_app
from fedmllm.cli.models import models_app
from fedmllm.files import require_new_folder
from fedmllm.registry import GROUP, load_plugins
from fedmllm.settings_file import GRID, read_settings
from fedmllm.sites.commands import server_app, site_app

if TYPE_CHECKING:
    from fedmllm.config import Experiment
    from fedmllm.run.results import RunResult

app = typer.Typer(
    name="fedmllm",
    help="Federated fine-tuning of multimodal LLMs across clients whose modalities differ.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app, name="data")
app.add_typer(models_app, name="models")
app.add_typer(server_app, name="server")
app.add_typer(site_app, name="site")


@app.command()
def train(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/<experiment>-<time>.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run (the newest unfinished one, or --output).")
    ] = False,
    track: Annotated[
        list[str], typer.Option(help="Where to write the numbers down besides: tensorboard, wandb, mlflow, none; once for each.")
    ] = ["tensorboard"],  # noqa: B006
    force: Force = False,
) -> None:
    """Train an experiment; write numbers, adapter and report into a run folder."""
    settings, opened = loaded(experiment, overrides), list[Path]()
    from fedmllm import api
    from fedmllm.reports.progress import Display

    _print_plan(settings)
    try:
        with Display(settings.federation.num_rounds) as display:
            trackers = [tracker for tracker in track if tracker != "none"]
            observer = replace(display.observer, opened=opened.append)
            result = api.train(settings, output, name=experiment.stem, resume=resume, observer=observer, track=trackers, force=force)
    except KeyboardInterrupt:
        typer.echo("interrupted; go on with the same command and --resume", err=True)
        raise typer.Exit(130) from None
    _print_result(result)
    (folder,) = opened
    typer.echo(f"\nrun folder  {folder}\nadapter     {folder / 'adapter'}\nreport      {folder / 'report.html'}")


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="Grid in YAML, e.g. experiments/nano/settings.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Sweep folder. Default: sweeps/<grid>.")] = None,
    shard: Annotated[str, typer.Option(help="Share of the cells, i/n with i from 0: for several machines.")] = "0/1",
    jobs: Annotated[int, typer.Option(help="Processes, each with a model of its own.", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="Of each process. Default: the cores divided by the jobs.", min=1)] = None,
    submit_check: Annotated[
        bool, typer.Option("--submit-check", help="Train nothing: check all cells, and write leaderboard.json if they stand.")
    ] = False,
) -> None:
    """Train every experiment of a grid that is not trained yet; the same command goes on where it was stopped."""
    read_settings(grid, GRID)
    from fedmllm.reports.progress import SweepDisplay
    from fedmllm.sweeps.grid import cells, load_grid
    from fedmllm.sweeps.leaderboard import submit
    from fedmllm.sweeps.runner import failures, open_sweep, require_sources, run_sweep, share

    whole, folder = load_grid(grid), output or Path("sweeps") / grid.stem
    every = cells(whole)
    mine = share(every, shard)
    require_sources(mine, grid)
    if submit_check:
        path = submit(every, folder)
        typer.echo(f"all {len(every)} cells stand\nleaderboard  {path}")
        return
    open_sweep(whole, folder)
    try:
        run_sweep(mine, folder, jobs, threads, SweepDisplay(mine, folder, jobs).told)
    except KeyboardInterrupt:
        typer.echo("interrupted; go on with the same command", err=True)
        raise typer.Exit(130) from None
    if failed := failures(folder):
        typer.echo(f"{len(failed)} cell(s) failed; the same command tries them again:\n" + "\n".join(failed), err=True)
        raise typer.Exit(1)
    typer.echo(f"sweep folder  {folder}\nits report    fedmllm report {folder}")


for command in (evaluate, chat, merge):
    app.command()(command)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder, or a sweep's.")]) -> None:
    """Write the report.html of a run or a sweep anew; of a sweep also tables.md, tables.tex and results.csv."""
    typer.echo(_written(folder))


@app.command()
def choose(folder: Annotated[Path, typer.Argument(help="A sweep's folder.")]) -> None:
    """Rank a sweep's methods by their scores on the validation part. The test split is not looked at."""
    from fedmllm.sweeps.choosing import ranked
    from fedmllm.sweeps.comparison import read_sweep

    sweep = read_sweep(folder)
    typer.echo(f"mean score on the validation part over {len(sweep.shared)} column(s) and {len(sweep.seeds)} seed(s)")
    for choice in ranked(sweep):
        typer.echo(f"{choice.score:.3f}{'' if choice.error is None else f' ± {choice.error:.3f}'}  {choice.method}")


@app.command()
def methods(
    as_json: AsJson = False,
    plugin: Annotated[list[str] | None, typer.Option(help="A Python file or module that adds some; once for each.")] = None,
) -> None:
    """Describe every federated method and strategy: what it does, takes, sends and keeps."""
    from fedmllm.cli.catalog import recorded

    rows = {kind: listed for kind, listed in recorded().items() if kind != "models"}
    if plugin or entry_points(group=GROUP):
        load_plugins(plugin or [])
        from fedmllm.reports.methods import from_plugins

        rows = {kind: listed | from_plugins()[kind] for kind, listed in rows.items()}
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    from fedmllm.cli.tables import methods_view

    Console().print(methods_view(rows))


@app.command()
def pretrain_nano(
    output: Annotated[Path, typer.Option(help="Folder for the model; it must not exist.")],
    seed: Annotated[int, typer.Option(help="All random numbers derive from it.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: as for the embedded model.", min=1)] = None,
) -> None:
    """Make the embedded model anew, from scratch: about 15 minutes on 2 cores."""
    require_new_folder(output)
    from fedmllm.models.nano.pretrain import PretrainConfig, make_nano

    config = PretrainConfig(seed=seed) if steps is None else PretrainConfig(seed=seed, steps=steps)
    make_nano(output, config, typer.echo)
    typer.echo(f"model  {output}")


def _written(folder: Path) -> Path:
    """The report of a run's folder or a sweep's, written again."""
    if (folder / "cells").is_dir():
        from fedmllm.reports.sweep_report import write_sweep_report

        return write_sweep_report(folder)
    from fedmllm.reports.run_report import write_report

    return write_report(folder)


def _print_plan(settings: Experiment) -> None:
    """What training will take, before the model is loaded; nothing for a model that cannot be planned, of which loading will tell more."""
    from fedmllm.cli.tables import plan_line
    from fedmllm.errors import ModelError
    from fedmllm.reports.models import describe

    try:
        typer.echo(plan_line(describe(settings)))
    except ModelError:
        return


def _print_result(result: RunResult) -> None:
    """The final table: each score beside its standard error."""
    from rich.console import Console

    from fedmllm.cli.tables import result_table

    Console().print(result_table(result))


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk, a quota or a file that is full."""
NO_ENTRY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""What it says of a path that may not or cannot be written or read."""


def main() -> None:
    """Run the command line; an error of ours, or of the disk, becomes one message and its exit code."""
    from fedmllm.errors import FedMLLMError

    for stream in (sys.stdout, sys.stderr):
        # A console may lack letters that data have; what it lacks it shows as question marks.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app()
    except FedMLLMError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None or error.errno not in (*NO_ROOM, *NO_ENTRY):
            raise
        full = error.errno in NO_ROOM
        remedy = "make room, then give the same command again, fedmllm train with --resume" if full else "choose another path, or allow it"
        typer.echo(f"error: {error.filename}: {error.strerror}; {remedy}", err=True)
        sys.exit(1 if full else 2)
