"""Commands that inspect data: ``fedmllm data``.

Heavy imports stay inside the commands.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fedmllm.cli.arguments import AsJson, ExperimentFile, Overrides, group, loaded
from fedmllm.files import require_new_folder

data_app = group("Inspect data before training.")


@data_app.command("list")
def data_list(as_json: AsJson = False) -> None:
    """List all datasets, scenarios, benchmark settings and further kinds of heterogeneity."""
    from fedmllm.reports.split import catalog

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
    as_json: AsJson = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw the clients' samples to this file, e.g. clients.png.")] = None,
) -> None:
    """Show a split: each client's samples by label and modality, and one sample as the model sees it."""
    from fedmllm.reports.split import describe, save_picture

    record = describe(loaded(experiment, overrides))
    if picture:
        save_picture(record, picture)
    if as_json:
        typer.echo(json.dumps(record, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    from fedmllm.cli.tables import split_view

    Console().print(split_view(record))


@data_app.command("export")
def data_export(
    experiment: ExperimentFile,
    output: Annotated[Path, typer.Option(help="Folder for the files; it must not exist.")],
    overrides: Overrides = None,
) -> None:
    """Write a split as JSON lines, images and a manifest, and an experiment that trains on them."""
    from fedmllm.reports.split import export_split

    require_new_folder(output)
    typer.echo(f"experiment  {export_split(loaded(experiment, overrides), output)}")
