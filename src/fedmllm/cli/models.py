"""Commands that inspect models: ``fedmllm models``.

Heavy imports stay inside the commands.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedmllm.cli.arguments import AsJson, group

models_app = group("Inspect models before training.")


@models_app.command("list")
def models_list(as_json: AsJson = False) -> None:
    """List the tested kinds of models. Others work if Transformers supports them and their processor has a chat template."""
    from fedmllm.cli.catalog import recorded

    rows = recorded()["models"]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    for kind, row in rows.items():
        typer.echo(f"{kind:<18}{row['models']:<32}{row['family']}")


@models_app.command("plan")
def models_plan(
    model: Annotated[str, typer.Argument(help="nano, a Transformers folder, or a hub id; only its config is read.")],
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    targets: Annotated[str, typer.Option(help="Adapted layers: attention or all-linear.")] = "attention",
    dtype: Annotated[str, typer.Option(help="Number format of the frozen weights: float32 or bfloat16.")] = "bfloat16",
    quantization: Annotated[str, typer.Option(help="Quantization of the frozen weights: none or 4bit.")] = "none",
    connector: Annotated[str, typer.Option(help="Connector of vision tower and decoder: frozen, lora or full.")] = "frozen",
    embeddings: Annotated[str, typer.Option(help="Token embeddings: frozen or full.")] = "frozen",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Plan with model.gradient_checkpointing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what training a model takes: parameters, bytes to send, memory."""
    from fedmllm.config import Experiment
    from fedmllm.reports.models import describe

    settings = {
        "model": {"name": model, "dtype": dtype, "quantization": quantization, "gradient_checkpointing": checkpointing},
        "lora": {"r": rank, "targets": targets, "connector": connector, "embeddings": embeddings},
    }
    record = describe(Experiment.parse(settings))
    if as_json:
        typer.echo(json.dumps(record, indent=1))
        return
    from rich.console import Console

    from fedmllm.cli.tables import plan_view

    Console().print(plan_view(record))
