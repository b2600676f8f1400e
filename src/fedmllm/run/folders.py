"""Run folders: their names, and what is in them before training."""

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
"""Where runs are whose folder is not named."""


def default_folder(name: str) -> Path:
    """``runs/<name>-<time>``, made here, with a number behind it where a run that began in the same second has it."""
    RUNS.mkdir(exist_ok=True)
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for number in count(1):
        folder = RUNS / (stem if number == 1 else f"{stem}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def unfinished_folder(name: str) -> Path:
    """The newest run of that name in ``runs/`` without a result.

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
    """Refuse to mix two runs in one folder, and a folder that cannot be made; None stands for one that is still to be named."""
    require_folder(folder or RUNS)
    if folder is None:
        return
    config = folder / "config.yaml"
    if not resume:
        # What begins with a dot is a draft that a crash left, or the system's own.
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise RunError(f"{folder}: the run folder is not empty; choose another --output, or go on with --resume")
    elif not config.is_file():
        raise RunError(f"{folder}: no config.yaml, so there is no run to resume; leave --resume out")
    elif changed := differences(Experiment.load(config), experiment):
        raise RunError(f"{folder}: cannot resume with other settings than the run began with (there and now):\n{listing(changed)}")


def known_model(began_in: Path | None, experiment: Experiment, force: bool) -> Experiment:
    """The experiment with the fingerprint of its model, by which the run, and who uses its adapter later, tells it from another.

    Args:
        began_in: the folder of the run that is resumed; None for a new one.
        experiment: with or without a fingerprint.
        force: take the model as it is.

    Raises:
        ModelError: if there is no such model.
        RunError: if a run is resumed that began with another.
    """
    if force:
        return experiment.with_fingerprint(fingerprint_of(experiment.model))
    found = experiment.model.fingerprint or fingerprint_of(experiment.model)
    began = Experiment.load(began_in / "config.yaml").model.fingerprint if began_in else None
    if began not in (None, found):
        raise RunError(
            f"{began_in}: model.name: {experiment.model.name!r} is another model than the run began with (there {began}, now {found}); "
            "give that one, or go on with --force"
        )
    return experiment.with_fingerprint(found)


def open_folder(folder: Path | None, name: str, experiment: Experiment, data: FederatedData, resume: bool) -> Path:
    """The folder with what is known before training. Both files are functions of the experiment: a resume rewrites them alike.

    Args:
        folder: None for that of ``default_folder``.
        name: of the experiment.
        experiment: as it is run.
        data: of its clients.
        resume: whether the run began before.

    Raises:
        RunError: if another run began in the folder meanwhile, or a resumed one with other samples.
    """
    opened, record = folder or default_folder(name), manifest(data, experiment.federation.scenario, experiment.seed)
    if resume:
        _require_same_data(opened / "manifest.json", record)
    try:
        write_atomically(opened / "config.yaml", experiment.to_yaml().encode(), new=not resume)
    except FileExistsError:
        raise RunError(f"{opened}: another run began there a moment ago; choose another --output") from None
    write_json(opened / "manifest.json", record)
    return opened


def _require_same_data(path: Path, record: Record) -> None:
    """Refuse to go on with other samples than the run began with."""
    began, now = _samples(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}), _samples(record)
    problems = [f"{name}: {change}" for name in now if name in began for change in changed(began[name], now[name])]
    if problems:
        raise RunError(
            f"{path}: the data are not those that the run began with, {len(problems):,} sample(s) differ; restore them, or start a new run in "
            f"another folder:\n{listing(problems)}"
        )


def _samples(record: Record) -> dict[str, dict[str, str]]:
    """Ids and digests of the samples of each client, of the validation part and of the test split; none where a crash or an older version left no digests."""
    if "samples" not in record.get("test", {}):
        return {}
    holders = [*((client["id"], client["samples"]) for client in record["clients"]), ("test", record["test"]["samples"])]
    if "samples" in record.get("validation", {}):
        holders.append(("validation", record["validation"]["samples"]))
    return {name: {sample["id"]: sample["digest"] for sample in samples} for name, samples in holders}
