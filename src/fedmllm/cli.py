"""The command line: parse, call, print.

Heavy imports stay inside the commands, behind what can be refused without them: ``--help``, a listing or a mistyped path answers at once.
"""

from __future__ import annotations

import errno
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmllm.benchmark.adapters import find_adapter
from fedmllm.files import require_new_folder
from fedmllm.settings_file import GRID, read_settings
from fedmllm.sites.commands import server_app, site_app

if TYPE_CHECKING:
    from fedmllm.benchmark.results import RunResult
    from fedmllm.config import Experiment

app = typer.Typer(
    name="fedmllm",
    help="Federated fine-tuning of multimodal LLMs across clients whose modalities differ.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Look at data before training on them.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(data_app, name="data")
models_app = typer.Typer(help="Look at models before training them.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(models_app, name="models")
app.add_typer(server_app, name="server")
app.add_typer(site_app, name="site")

ExperimentFile = Annotated[Path, typer.Argument(help="Experiment in YAML, e.g. experiments/quickstart.yaml.")]
Force = Annotated[bool, typer.Option("--force", help="Take the model although it is another than the run began with.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value, e.g. federation.num_rounds=5.")]


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
    settings, opened = _loaded(experiment, overrides), list[Path]()
    from fedmllm.benchmark import run
    from fedmllm.display import Display

    _print_plan(settings)
    try:
        with Display(settings.federation.num_rounds) as display:
            trackers = [tracker for tracker in track if tracker != "none"]
            observer = replace(display.observer, opened=opened.append)
            result = run.train(settings, output, name=experiment.stem, resume=resume, observer=observer, track=trackers, force=force)
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
    from fedmllm.benchmark.grid import cells, load_grid
    from fedmllm.benchmark.submission import submit
    from fedmllm.benchmark.sweep import failures, open_sweep, require_sources, run_sweep, share
    from fedmllm.display import SweepDisplay

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


@app.command()
def evaluate(
    run_or_adapter: Annotated[Path, typer.Argument(help="A run folder, or a PEFT adapter folder.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value, e.g. data.root=/data/vqa_rad.")] = None,
    experiment: Annotated[
        Path | None, typer.Option(help="Experiment that names model and data, for an adapter outside a run folder.")
    ] = None,
    force: Force = False,
) -> None:
    """Score a trained adapter on its experiment's test data."""
    find_adapter(run_or_adapter, experiment)
    from fedmllm.benchmark.scoring import score_adapter

    metric, scores = score_adapter(run_or_adapter, experiment, overrides or [], force)
    typer.echo(f"metric  {metric}")
    for name, value in scores.items():
        typer.echo(f"{name:<18}{value:.4g}")


@app.command()
def chat(
    run_or_adapter: Annotated[Path, typer.Argument(help="A run folder, or a PEFT adapter folder.")],
    question: Annotated[str | None, typer.Argument(help="Default: ask what is typed, line by line.")] = None,
    image: Annotated[Path | None, typer.Option(help="What the questions are about.")] = None,
    text: Annotated[str | None, typer.Option(help="The same in words.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="An answer to choose; once for each.")] = None,
    experiment: Annotated[Path | None, typer.Option(help="Experiment that names the model, for an adapter outside a run folder.")] = None,
    force: Force = False,
) -> None:
    """Ask a trained model, in the words it was trained on."""
    find_adapter(run_or_adapter, experiment)
    from fedmllm.benchmark.scoring import chat as chat_with

    content = {name: value for name, value in (("image", image), ("text", text)) if value is not None}
    ask = chat_with(run_or_adapter, experiment, content, option or (), force)
    for line in [question] if question else sys.stdin:
        if line.strip():
            prediction = ask(line.strip())
            typer.echo(prediction.answer or "(no answer)")
            for name, probability in zip(option or (), prediction.probabilities, strict=False):
                typer.echo(f"  {probability:.3f}  {name}")


@app.command()
def merge(
    run_or_adapter: Annotated[Path, typer.Argument(help="A run folder, or a PEFT adapter folder.")],
    output: Annotated[Path, typer.Option(help="Folder for the model; it must not exist.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value, e.g. model.name=/models/qwen.")] = None,
    experiment: Annotated[Path | None, typer.Option(help="Experiment that names the model, for an adapter outside a run folder.")] = None,
    force: Force = False,
) -> None:
    """Write the whole model with a trained adapter merged into its weights."""
    require_new_folder(output)
    find_adapter(run_or_adapter, experiment)
    from fedmllm.benchmark.scoring import merge as merge_adapter

    lost = merge_adapter(run_or_adapter, output, experiment, overrides or [], force)
    typer.echo(f"model  {output}")
    if lost > 0.001:
        typer.echo(f"lost   {lost:.1%} of the adapter's change, to the number format; model.dtype=float32 keeps it, in twice the size")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder, or a sweep's.")]) -> None:
    """Write the report.html of a run or a sweep anew; of a sweep also tables.md, tables.tex and results.csv."""
    typer.echo(_written(folder))


@app.command()
def choose(folder: Annotated[Path, typer.Argument(help="A sweep's folder.")]) -> None:
    """Rank a sweep's methods by their scores on the validation part. The test split is not looked at."""
    from fedmllm.benchmark.choosing import ranked
    from fedmllm.benchmark.comparison import read_sweep

    sweep = read_sweep(folder)
    typer.echo(f"mean score on the validation part over {len(sweep.shared)} column(s) and {len(sweep.seeds)} seed(s)")
    for choice in ranked(sweep):
        typer.echo(f"{choice.score:.3f}{'' if choice.error is None else f' ± {choice.error:.3f}'}  {choice.method}")


@app.command()
def methods(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Describe every federated method and strategy: what it does, takes, sends and keeps."""
    from fedmllm.benchmark.catalog import recorded

    rows = {kind: listed for kind, listed in recorded().items() if kind != "models"}
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    from fedmllm.views import methods_view

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


@data_app.command("list")
def data_list(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Name every dataset, scenario, setting of the benchmark and further kind of heterogeneity."""
    from fedmllm.benchmark.data_view import catalog

    rows = catalog()
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for kind, names in rows.items():
        typer.echo(f"{kind}:")
        for name, summary in names.items():
            typer.echo(f"  {name:<20}{summary}")


@data_app.command("show")
def data_show(
    experiment: ExperimentFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw the clients' samples into this file, e.g. clients.png.")] = None,
) -> None:
    """Show a split: each client's samples by label and modality, and one sample as the model sees it."""
    from fedmllm.benchmark.data_view import describe, save_picture

    record = describe(_loaded(experiment, overrides))
    if picture:
        save_picture(record, picture)
    if as_json:
        typer.echo(json.dumps(record, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    from fedmllm.views import split_view

    Console().print(split_view(record))


@data_app.command("export")
def data_export(
    experiment: ExperimentFile,
    output: Annotated[Path, typer.Option(help="Folder for the files; it must not exist.")],
    overrides: Overrides = None,
) -> None:
    """Write a split as JSON lines, pictures and a manifest, with an experiment that trains on them."""
    from fedmllm.benchmark.data_view import export_split

    require_new_folder(output)
    typer.echo(f"experiment  {export_split(_loaded(experiment, overrides), output)}")


@models_app.command("list")
def models_list(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Name the tested kinds of models. Others work if Transformers has them and their processor has a chat template."""
    from fedmllm.benchmark.catalog import recorded

    rows = recorded()["models"]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for kind, row in rows.items():
        typer.echo(f"{kind:<18}{row['models']:<32}{row['family']}")


@models_app.command("plan")
def models_plan(
    model: Annotated[str, typer.Argument(help="nano, a Transformers folder, or a hub id; its config is all that is read.")],
    rank: Annotated[int, typer.Option(help="Of LoRA.")] = 8,
    targets: Annotated[str, typer.Option(help="Adapted layers: attention or all-linear.")] = "attention",
    dtype: Annotated[str, typer.Option(help="Of the frozen weights: float32 or bfloat16.")] = "bfloat16",
    quantization: Annotated[str, typer.Option(help="Of the frozen weights: none or 4bit.")] = "none",
    connector: Annotated[str, typer.Option(help="Between vision tower and decoder: frozen, lora or full.")] = "frozen",
    embeddings: Annotated[str, typer.Option(help="Of the tokens: frozen or full.")] = "frozen",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="With model.gradient_checkpointing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Tell what training a model takes: parameters, bytes to send, memory."""
    from fedmllm.benchmark.models_view import describe
    from fedmllm.config import Experiment

    settings = {
        "model": {"name": model, "dtype": dtype, "quantization": quantization, "gradient_checkpointing": checkpointing},
        "lora": {"r": rank, "targets": targets, "connector": connector, "embeddings": embeddings},
    }
    record = describe(Experiment.parse(settings))
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    from rich.console import Console

    from fedmllm.views import plan_view

    Console().print(plan_view(record))


def _loaded(file: Path, overrides: list[str] | None) -> Experiment:
    """The experiment of a file. What is no YAML is refused before the imports that it takes to check settings."""
    read_settings(file)
    from fedmllm.config import Experiment

    return Experiment.load(file, overrides or [])


def _written(folder: Path) -> Path:
    """The report of a run's folder or a sweep's, written again."""
    if (folder / "cells").is_dir():
        from fedmllm.benchmark.grid_report import write_sweep_report

        return write_sweep_report(folder)
    from fedmllm.benchmark.report import write_report

    return write_report(folder)


def _print_plan(settings: Experiment) -> None:
    """What training will take, before the model is loaded; nothing for a model that cannot be planned, of which loading will tell more."""
    from fedmllm.benchmark.models_view import describe
    from fedmllm.errors import ModelError
    from fedmllm.views import plan_line

    try:
        typer.echo(plan_line(describe(settings)))
    except ModelError:
        return


def _print_result(result: RunResult) -> None:
    """The final table: each score beside its standard error."""
    from rich.console import Console

    from fedmllm.views import result_table

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
