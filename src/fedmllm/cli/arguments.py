"""Arguments that several commands share, and loading an experiment from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmllm.settings_file import read_settings

if TYPE_CHECKING:
    from fedmllm.config import Experiment

ADVANCED = "Advanced"
"""The panel of ``--help`` for options that few users need."""
ExperimentFile = Annotated[Path, typer.Argument(help="Experiment in YAML, e.g. experiments/quickstart.yaml.")]
Force = Annotated[
    bool, typer.Option("--force", help="Accept the model even if it is not the one that the run started with.", rich_help_panel=ADVANCED)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings as key.path=value, e.g. federation.num_rounds=5. fedmllm settings lists them.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RunOrAdapter = Annotated[Path, typer.Argument(help="A run folder, or a PEFT adapter folder.")]


def group(description: str) -> typer.Typer:
    """Return an empty group of commands with a help text."""
    return typer.Typer(help=description, no_args_is_help=True, pretty_exceptions_enable=False)


def loaded(file: Path, overrides: list[str] | None) -> Experiment:
    """Load an experiment from a file. Invalid YAML is refused before the heavy imports that checking the settings needs."""
    read_settings(file)
    from fedmllm.config import Experiment

    return Experiment.load(file, overrides or [])
