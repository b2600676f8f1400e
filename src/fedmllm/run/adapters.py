"""Where a trained adapter is, and which experiment it is of: found without importing what loads it."""

from __future__ import annotations

from pathlib import Path

from fedmllm.errors import RunError
from fedmllm.settings_file import read_settings


def find_adapter(path: Path, experiment_file: Path | None = None) -> tuple[Path, Path, Path | None]:
    """An adapter's folder, the file of the experiment that names its model and data, and the run's own such file, None where there is none.

    Args:
        path: a run folder, or a PEFT adapter folder.
        experiment_file: the experiment; by default the run's own ``config.yaml``.

    Raises:
        RunError: if there is no such folder, or neither it nor the arguments say which experiment it is.
        ConfigError: if the experiment cannot be read.
    """
    if not path.is_dir():
        raise RunError(f"{path}: no such folder; give a run folder or a PEFT adapter folder")
    adapter = path / "adapter" if (path / "adapter").is_dir() else path
    own = _own_config(path, adapter)
    chosen = experiment_file or own
    if chosen is None:
        raise RunError(f"{path}: no config.yaml here or beside it; name the experiment with --experiment FILE.yaml")
    read_settings(chosen)
    return adapter, chosen, own


def _own_config(path: Path, adapter: Path) -> Path | None:
    """The ``config.yaml`` of the run that the folder is, or lies in; a client's own adapter lies one folder deeper."""
    places = (folder / "config.yaml" for folder in (path, *adapter.resolve().parents[:2]))
    return next((place for place in places if place.is_file()), None)
