"""Finds a trained adapter and its experiment, without importing the modules that load models."""

from __future__ import annotations

from pathlib import Path

from fedmllm.errors import RunError
from fedmllm.settings_file import read_settings


def find_adapter(path: Path, experiment_file: Path | None = None) -> tuple[Path, Path, Path | None]:
    """Find an adapter and its experiment.

    Args:
        path: a run folder, or a PEFT adapter folder.
        experiment_file: the experiment's file; by default the run's own ``config.yaml``.

    Returns:
        The adapter folder, the experiment file to use, and the run's own ``config.yaml`` or None.

    Raises:
        RunError: if there is no such folder, or no experiment file is given or found.
        ConfigError: if the experiment file cannot be read.
    """
    if not path.is_dir():
        raise RunError(f"{path}: no such folder; give a run folder or a PEFT adapter folder")
    adapter = path / "adapter" if (path / "adapter").is_dir() else path
    own = _own_config(path, adapter)
    chosen = experiment_file or own
    if chosen is None:
        raise RunError(f"{path}: no config.yaml in this folder or in the run folder; name the experiment with --experiment FILE.yaml")
    read_settings(chosen)
    return adapter, chosen, own


def _own_config(path: Path, adapter: Path) -> Path | None:
    """Return the ``config.yaml`` in the folder or in a run folder above it. The adapter of a personalized model lies one folder deeper."""
    places = (folder / "config.yaml" for folder in (path, *adapter.resolve().parents[:2]))
    return next((place for place in places if place.is_file()), None)
