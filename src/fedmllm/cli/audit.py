"""The command ``fedmllm audit``. Heavy imports stay inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from fedmllm.cli.arguments import ADVANCED
from fedmllm.errors import RunError


def audit(
    run_or_sweep: Annotated[Path, typer.Argument(help="The folder of a finished run, or of a sweep.")],
    unit: Annotated[
        str | None, typer.Option(help="What an attacker looks for: sample or client. Default: what the run protects, else sample.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the coins that decide who is in the twin.", rich_help_panel=ADVANCED)] = 0,
) -> None:
    """Train a run's twin on a random half of its data, and test how well attacks tell which half.

    The result is in RUN/audit/audit.json and in the report. If the attacks rule out the stated epsilon, the exit code is 1.
    """
    if not any((run_or_sweep / name).exists() for name in ("result.json", "cells")):
        raise RunError(
            f"{run_or_sweep}: not a finished run (no result.json); finish it with fedmllm train ... --resume, or name another folder"
        )
    if unit not in (None, "sample", "client"):
        raise typer.BadParameter(f"must be sample or client, got {unit}", param_hint="--unit")
    from fedmllm import api
    from fedmllm.cli.tables import audit_lines
    from fedmllm.run.audit_result import AuditUnit

    found = api.audit(run_or_sweep, cast(AuditUnit | None, unit), seed=seed, progress=True)
    for name, result in found.items():
        typer.echo("\n".join([f"\n{name}", *audit_lines(result)]))
    typer.echo(f"\nreport  {run_or_sweep / 'report.html'}")
    if any(result.contradicts for result in found.values()):
        raise typer.Exit(1)
