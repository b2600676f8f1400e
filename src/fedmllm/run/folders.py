"""Run folders: their names, and the files that they hold before training."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from fedmllm.config import Experiment, differences
from fedmllm.data.content import changed
from fedmllm.data.federated import FederatedData, manifest
from fedmllm.errors import RunError, listing
from fedmllm.files import require_folder, write_atomically, write_json
from fedmllm.models.load import fingerprint_of
from fedmllm.types import Record

RUNS = Path("runs")
"""The folder of runs without ``--output``."""


def default_folder(name: str) -> Path:
    """Create and return ``runs/<name>-<time>``. If another run of the same second has that name, append a number."""
    RUNS.mkdir(exist_ok=True)
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        folder = RUNS / (stem if number == 1 else f"{stem}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def unfinished_folder(name: str) -> Path:
    """Return the folder of the newest unfinished run of that name in ``runs/``.

    Raises:
        RunError: if there is none.
    """
    own = re.compile(re.escape(name) + r"-(\d{8}-\d{6})(?:-(\d+))?")
    matches = [(match, path) for path in (RUNS.iterdir() if RUNS.is_dir() else ()) if (match := own.fullmatch(path.name))]
    found = [
        (match[1], int(match[2] or 1), path)
        for match, path in matches
        if (path / "config.yaml").is_file() and not (path / "result.json").is_file()
    ]
    if not found:
        raise RunError(f"runs/{name}-*: no unfinished run to resume; name the folder with --output")
    return max(found)[-1]


def check_folder(folder: Path | None, experiment: Experiment, resume: bool) -> None:
    """Check that a run may write to a folder.

    Args:
        folder: the run folder; None if it has no name yet.
        experiment: the settings of the run.
        resume: whether to resume the run in the folder.

    Raises:
        RunError: if the folder holds another run, holds none to resume, or cannot be created.
    """
    require_folder(folder or RUNS)
    if folder is None:
        return
    config = folder / "config.yaml"
    if not resume:
        # Names that begin with a dot are drafts that a crash left, or files of the operating system.
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise RunError(f"{folder}: the run folder is not empty; choose another --output, or continue the run with --resume")
    elif not config.is_file():
        raise RunError(f"{folder}: no config.yaml, so there is no run to resume; omit --resume")
    elif changed := differences(Experiment.load(config), experiment):
        raise RunError(f"{folder}: cannot resume with different settings (the run's and the current ones):\n{listing(changed)}")


def known_model(began_in: Path | None, experiment: Experiment, force: bool) -> Experiment:
    """Return the experiment with its model's fingerprint, which identifies the model when the run resumes or its adapter is used.

    Args:
        began_in: the folder of the run to resume; None for a new run.
        experiment: the experiment, with or without a fingerprint.
        force: accept the model even if it is not the one that the run started with.

    Raises:
        ModelError: if there is no such model.
        RunError: if the resumed run started with another model.
    """
    if force:
        return experiment.with_fingerprint(fingerprint_of(experiment.model))
    found = experiment.model.fingerprint or fingerprint_of(experiment.model)
    began = Experiment.load(began_in / "config.yaml").model.fingerprint if began_in else None
    if began not in (None, found):
        raise RunError(
            f"{began_in}: model.name: {experiment.model.name!r} is not the model that the run started with (fingerprint then {began}, now {found}); "
            "use that model, or pass --force"
        )
    return experiment.with_fingerprint(found)


def open_folder(folder: Path | None, name: str, experiment: Experiment, data: FederatedData, resume: bool) -> Path:
    """Create the run folder and write ``config.yaml`` and ``manifest.json``.

    Both files depend on the experiment alone, so a resumed run writes the same content again.

    Args:
        folder: the run folder; None for ``default_folder``.
        name: the experiment's name.
        experiment: the settings of the run.
        data: the clients' data.
        resume: whether this resumes an earlier run.

    Returns:
        The run folder.

    Raises:
        RunError: if another run has started in the folder in the meantime, or the resumed run started with other samples.
    """
    opened, record = folder or default_folder(name), manifest(data, experiment.federation.scenario, experiment.seed)
    if resume:
        _require_same_data(opened / "manifest.json", record)
    try:
        write_atomically(opened / "config.yaml", experiment.to_yaml().encode(), new=not resume)
    except FileExistsError:
        raise RunError(f"{opened}: another run has just started there; choose another --output") from None
    write_json(opened / "manifest.json", record)
    return opened


def _require_same_data(path: Path, record: Record) -> None:
    """Refuse to resume with other samples than the run started with."""
    began, now = _samples(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}), _samples(record)
    problems = [f"{name}: {change}" for name in now if name in began for change in changed(began[name], now[name])]
    if problems:
        raise RunError(
            f"{path}: the data have changed since the run started, {len(problems):,} sample(s) differ; restore them, or start a new run in "
            f"another folder:\n{listing(problems)}"
        )


def _samples(record: Record) -> dict[str, dict[str, str]]:
    """Return ids and digests of the samples of each client, the validation split and the test split.

    The result is empty if a crash or an older version left no digests.
    """
    if "samples" not in record.get("test", {}):
        return {}
    holders = [*((client["id"], client["samples"]) for client in record["clients"]), ("test", record["test"]["samples"])]
    if "samples" in record.get("validation", {}):
        holders.append(("validation", record["validation"]["samples"]))
    return {name: {sample["id"]: sample["digest"] for sample in samples} for name, samples in holders}
