"""Commands that use a trained adapter: ``fedmllm evaluate``, ``chat`` and ``merge``.

Heavy imports stay inside the commands.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedmllm.cli.arguments import Force, RunOrAdapter
from fedmllm.files import require_new_folder
from fedmllm.run.adapters import find_adapter


def evaluate(
    run_or_adapter: RunOrAdapter,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value, e.g. data.root=/data/vqa_rad.")] = None,
    experiment: Annotated[
        Path | None, typer.Option(help="Experiment that names model and data, if the adapter is outside a run folder.")
    ] = None,
    force: Force = False,
) -> None:
    """Score a trained adapter on its experiment's test split."""
    find_adapter(run_or_adapter, experiment)
    from fedmllm.run.scoring import score_adapter

    metric, scores = score_adapter(run_or_adapter, experiment, overrides or [], force)
    typer.echo(f"metric  {metric}")
    for name, value in scores.items():
        typer.echo(f"{name:<18}{value:.4g}")


def chat(
    run_or_adapter: RunOrAdapter,
    question: Annotated[str | None, typer.Argument(help="The question. Default: read questions from standard input, one per line.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image that the questions refer to.")] = None,
    text: Annotated[str | None, typer.Option(help="Text that the questions refer to.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="An answer to choose from. Repeat the option for several.")] = None,
    experiment: Annotated[Path | None, typer.Option(help="Experiment that names the model, for an adapter outside a run folder.")] = None,
    force: Force = False,
) -> None:
    """Ask a trained model questions, phrased as in training."""
    find_adapter(run_or_adapter, experiment)
    from fedmllm.run.scoring import chat as chat_with

    content = {name: value for name, value in (("image", image), ("text", text)) if value is not None}
    ask = chat_with(run_or_adapter, experiment, content, option or (), force)
    for line in [question] if question else sys.stdin:
        if line.strip():
            prediction = ask(line.strip())
            typer.echo(prediction.answer or "(no answer)")
            for name, probability in zip(option or (), prediction.probabilities, strict=False):
                typer.echo(f"  {probability:.3f}  {name}")


def merge(
    run_or_adapter: RunOrAdapter,
    output: Annotated[Path, typer.Option(help="Folder for the model; it must not exist.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value, e.g. model.name=/models/qwen.")] = None,
    experiment: Annotated[Path | None, typer.Option(help="Experiment that names the model, for an adapter outside a run folder.")] = None,
    force: Force = False,
) -> None:
    """Write the complete model with a trained adapter merged into its weights."""
    require_new_folder(output)
    find_adapter(run_or_adapter, experiment)
    from fedmllm.run.scoring import merge as merge_adapter

    lost = merge_adapter(run_or_adapter, output, experiment, overrides or [], force)
    typer.echo(f"model  {output}")
    if lost > 0.001:
        typer.echo(f"lost   {lost:.1%} of the adapter's change, to rounding; model.dtype=float32 keeps it at twice the file size")
