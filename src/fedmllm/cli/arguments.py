"""Arguments that several commands take, and reading an experiment from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmllm.settings_file import read_settings

if TYPE_CHECKING:
    from fedmllm.config import Experiment

ExperimentFile = Annotated[Path, typer.Argument(help="Experiment in YAML, e.g. experiments/quickstart.yaml.")]
Force = Annotated[bool, typer.Option("--force", help="Take the model although it is another than the run began with.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key.path=value, e.g. federation.num_rounds=5.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
RunOrAdapter = Annotated[Path, typer.Argument(help="A run folder, or a PEFT adapter folder.")]


def group(description: str) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(help=description, no_args_is_help=True, pretty_exceptions_enable=False)


def loaded(file: Path, overrides: list[str] | None) -> Experiment:
    """The experiment of a file. What is no YAML is refused before the imports that it takes to check settings."""
    read_settings(file)
    from fedmllm.config import Experiment

    return Experiment.load(file, overrides or [])
