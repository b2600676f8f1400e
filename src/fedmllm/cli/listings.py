"""Commands that list what experiments can choose: ``fedmllm methods`` and ``fedmllm settings``.

Both print the recorded catalog. Heavy imports stay inside the commands.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fedmllm.cli.arguments import AsJson
from fedmllm.cli.catalog import recorded
from fedmllm.errors import ConfigError
from fedmllm.explain import meant
from fedmllm.registry import installed_plugins, load_plugins


def methods(
    as_json: AsJson = False,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Python file or module that adds methods or strategies. Repeat the option for several.")
    ] = None,
) -> None:
    """Describe every federated method and strategy: what it does, its parameters, what it sends and keeps."""
    catalog = recorded()
    rows = {kind: catalog[kind] for kind in ("methods", "strategies")}
    if plugin or installed_plugins():
        load_plugins(plugin or [])
        from fedmllm.reports.methods import from_plugins

        more = from_plugins()
        rows = {kind: listed | more[kind] for kind, listed in rows.items()}
    if as_json:
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    from fedmllm.cli.tables import methods_view

    Console().print(methods_view(rows))


def settings(
    section: Annotated[str | None, typer.Argument(help="A section of the experiment, e.g. training. Default: all.")] = None,
    advanced: Annotated[bool, typer.Option("--advanced", help="Also list settings that few experiments change.")] = False,
    as_json: AsJson = False,
) -> None:
    """List an experiment's settings with their defaults, rules and meanings."""
    sections = recorded()["settings"]
    if section is not None and section not in sections:
        raise ConfigError(f"{section!r} is not a section of an experiment{meant(section, sections)}")
    shown = {
        name: row | {"settings": {key: one for key, one in row["settings"].items() if advanced or not one["advanced"]}}
        for name, row in sections.items()
        if section in (None, name)
    }
    if as_json:
        typer.echo(json.dumps(shown, indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    from fedmllm.cli.tables import settings_view

    Console().print(settings_view(shown))
    if hidden := sum(len(sections[name]["settings"]) - len(row["settings"]) for name, row in shown.items()):
        typer.echo(f"{hidden} more with --advanced")
