"""The ``fedmllm`` command.

Heavy imports stay inside the commands, after the checks that do not need them, so that ``--help``, listings and mistyped paths answer at once.
"""

from __future__ import annotations

import errno
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fedmllm.cli.adapters import chat, evaluate, merge
from fedmllm.cli.arguments import ADVANCED, ExperimentFile, Force, Overrides, loaded
from fedmllm.cli.audit import audit
from fedmllm.cli.data import data_app
from fedmllm.cli.listings import methods, settings
from fedmllm.cli.models import models_app
from fedmllm.files import require_new_folder
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
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run (the newest unfinished one, or --output).")] = False,
    track: Annotated[
        list[str], typer.Option(help="Tracker for metrics: tensorboard, wandb, mlflow or none. Repeat the option for several.")
    ] = ["tensorboard"],  # noqa: B006
    force: Force = False,
) -> None:
    """Train an experiment and write metrics, adapter and report to a run folder."""
    chosen = loaded(experiment, overrides)
    from fedmllm import api

    _print_plan(chosen)
    trackers = [tracker for tracker in track if tracker != "none"]
    try:
        result = api.train(chosen, output, name=experiment.stem, resume=resume, track=trackers, force=force, progress=True)
    except KeyboardInterrupt:
        typer.echo("interrupted; continue with the same command and --resume", err=True)
        raise typer.Exit(130) from None
    _print_result(result)
    folder = cast(Path, result.folder)
    typer.echo(f"\nrun folder  {folder}\nadapter     {folder / 'adapter'}\nreport      {folder / 'report.html'}")


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="Grid in YAML, e.g. experiments/nano/settings.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Sweep folder. Default: sweeps/<grid>.")] = None,
    shard: Annotated[str, typer.Option(help="Share of the cells for this machine, i/n with i from 0.", rich_help_panel=ADVANCED)] = "0/1",
    jobs: Annotated[int, typer.Option(help="Number of processes. Each loads its own model.", min=1)] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Threads per process. Default: the CPU cores divided by the jobs.", min=1, rich_help_panel=ADVANCED)
    ] = None,
    submit_check: Annotated[
        bool,
        typer.Option(
            "--submit-check", help="Train nothing: check all cells, and write leaderboard.json if they pass.", rich_help_panel=ADVANCED
        ),
    ] = False,
) -> None:
    """Train all experiments of a grid that are not trained yet. If interrupted, the same command continues."""
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
        typer.echo(f"all {len(every)} cells passed the checks\nleaderboard  {path}")
        return
    open_sweep(whole, folder)
    try:
        run_sweep(mine, folder, jobs, threads, SweepDisplay(mine, folder, jobs).ended)
    except KeyboardInterrupt:
        typer.echo("interrupted; continue with the same command", err=True)
        raise typer.Exit(130) from None
    if failed := failures(folder):
        typer.echo(f"{len(failed)} cell(s) failed; run the same command to retry them:\n" + "\n".join(failed), err=True)
        raise typer.Exit(1)
    typer.echo(f"sweep folder  {folder}\nwrite report  fedmllm report {folder}")


for command in (evaluate, chat, merge):
    app.command()(command)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder or a sweep folder.")]) -> None:
    """Write the report.html of a run or a sweep again; for a sweep also tables.md, tables.tex and results.csv."""
    from fedmllm.reports import write_report_of

    typer.echo(write_report_of(folder))


@app.command()
def choose(folder: Annotated[Path, typer.Argument(help="A sweep folder.")]) -> None:
    """Rank a sweep's methods by their scores on the validation split, without using the test split."""
    from fedmllm.sweeps.choosing import ranked
    from fedmllm.sweeps.comparison import read_sweep

    sweep = read_sweep(folder)
    choices = ranked(sweep)
    typer.echo(f"mean score on the validation split over {len(sweep.shared)} column(s) and {len(sweep.seeds)} seed(s)")
    for choice in choices:
        typer.echo(f"{choice.score:.3f}{'' if choice.error is None else f' ± {choice.error:.3f}'}  {choice.method}")


app.command()(audit)
app.command()(methods)
app.command()(settings)


@app.command()
def pretrain_nano(
    output: Annotated[Path, typer.Option(help="Folder for the model; it must not exist.")],
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. Default: those of the embedded model.", min=1)] = None,
) -> None:
    """Pretrain the embedded model again from scratch: about 15 minutes on 2 cores."""
    require_new_folder(output)
    from fedmllm.models.nano.pretrain import PretrainConfig, make_nano

    config = PretrainConfig(seed=seed) if steps is None else PretrainConfig(seed=seed, steps=steps)
    make_nano(output, config, typer.echo)
    typer.echo(f"model  {output}")


def _print_plan(experiment: Experiment) -> None:
    """Print what training will take, before the model is loaded. Prints nothing if the model has no plan; loading it then reports why."""
    from fedmllm.cli.tables import plan_line
    from fedmllm.errors import ModelError
    from fedmllm.reports.models import describe

    try:
        typer.echo(plan_line(describe(experiment)))
    except ModelError:
        return


def _print_result(result: RunResult) -> None:
    """Print the final table of scores with standard errors."""
    from rich.console import Console

    from fedmllm.cli.tables import result_table

    Console().print(result_table(result))


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""System errors for a full disk, an exhausted quota or a file that is too large."""
NO_ENTRY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""System errors for a path that cannot be written or read."""


def main() -> None:
    """Run the command line. Turn errors of fedmllm and of the disk into one message and an exit code."""
    from fedmllm.errors import FedMLLMError

    for stream in (sys.stdout, sys.stderr):
        # The console may not support characters in the data; it shows question marks instead.
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
        remedy = (
            "free disk space, then run the same command again (fedmllm train with --resume)"
            if full
            else "choose another path, or change its permissions"
        )
        typer.echo(f"error: {error.filename}: {error.strerror}; {remedy}", err=True)
        sys.exit(1 if full else 2)
