"""Run folders: their names, and what is in them before training."""

from __future__ import annotations

import time
from pathlib import Path

from fedmllm.config import Experiment, differences
from fedmllm.data.federated import FederatedData, manifest
from fedmllm.engine.checkpoint import write_atomically, write_json
from fedmllm.errors import RunError, listing
from fedmllm.models.load import fingerprint_of


def default_folder(name: str) -> Path:
    """``runs/<name>-<time>``."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def unfinished_folder(name: str) -> Path:
    """The newest run of that name in ``runs/`` without a result.

    Raises:
        RunError: if there is none.
    """
    found = [
        path for path in sorted(Path("runs").glob(f"{name}-*")) if (path / "config.yaml").is_file() and not (path / "result.json").is_file()
    ]
    if not found:
        raise RunError(f"runs/{name}-*: no unfinished run to resume; name the folder with --output")
    return found[-1]


def check_folder(folder: Path, experiment: Experiment, resume: bool) -> None:
    """Refuse to mix two runs in one folder."""
    config = folder / "config.yaml"
    if not resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder}: the run folder is not empty; choose another --output, or go on with --resume")
    elif not config.is_file():
        raise RunError(f"{folder}: no config.yaml, so there is no run to resume; leave --resume out")
    elif changed := differences(Experiment.load(config), experiment):
        raise RunError(f"{folder}: cannot resume with other settings than the run began with (there and now):\n{listing(changed)}")


def known_model(folder: Path, experiment: Experiment, resume: bool, force: bool) -> Experiment:
    """The experiment with the fingerprint of its model, by which the run, and who uses its adapter later, tells it from another.

    Raises:
        ModelError: if there is no such model.
        RunError: if a run is resumed that began with another.
    """
    if force:
        return experiment.with_fingerprint(fingerprint_of(experiment.model))
    found = experiment.model.fingerprint or fingerprint_of(experiment.model)
    began = Experiment.load(folder / "config.yaml").model.fingerprint if resume else None
    if began not in (None, found):
        raise RunError(
            f"{folder}: model.name: {experiment.model.name!r} is another model than the run began with (there {began}, now {found}); "
            "give that one, or go on with --force"
        )
    return experiment.with_fingerprint(found)


def open_folder(folder: Path, experiment: Experiment, data: FederatedData) -> None:
    """The folder with what is known before training. Both files are functions of the experiment: a resume rewrites them alike."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", experiment.to_yaml().encode())
    write_json(folder / "manifest.json", manifest(data, experiment.federation.scenario, experiment.seed))
