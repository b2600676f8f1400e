"""A split as files: JSON lines, pictures and a manifest, from which an experiment can start anywhere."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from fedmllm.data.datasets import Dataset
from fedmllm.data.federated import FederatedData
from fedmllm.data.images import open_image
from fedmllm.files import require_new_folder, written
from fedmllm.types import Picture, Record, Sample

ROLES = ("id", "question", "options", "answer", "answer_type", "category", "client", "domain")


def export(data: FederatedData, folder: Path, record: Record, settings: Record) -> Path:
    """Write a split with what its scenario left of it.

    ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` hold a sample a line, ``files/`` what is no text (files as they are, pictures that were
    generated or altered as PNG), ``manifest.json`` the split, the SHA-256 of every file and where all came from, and
    ``experiment.yaml`` the settings under which ``fedmllm train`` goes on from here.

    Args:
        data: the split.
        folder: where to; made by this, and only once all is written.
        record: the manifest to which the files' hashes are added.
        settings: the experiment's own, as in its YAML.

    Returns:
        The experiment's file.

    Raises:
        RunError: if the folder exists already, or cannot be made.
    """
    require_new_folder(folder)
    building = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    with written(folder):
        (building / "files").mkdir(parents=True)
        train = sorted(((client, sample) for client, samples in data.clients.items() for sample in samples), key=lambda pair: pair[1].id)
        _write_rows(building, "train", train)
        for split, samples in _held_back(data.dataset).items():
            _write_rows(building, split, [("", sample) for sample in samples])
        (building / "experiment.yaml").write_text(_experiment(data, folder, settings), encoding="utf-8")
        hashes = {path.relative_to(building).as_posix(): _sha256(path) for path in sorted(building.rglob("*")) if path.is_file()}
        (building / "manifest.json").write_text(json.dumps({**record, "files": hashes}, indent=1), encoding="utf-8")
        building.rename(folder)
    return folder / "experiment.yaml"


def _held_back(dataset: Dataset) -> dict[str, tuple[Sample, ...]]:
    """The splits that are not trained on; without the validation part if there is none."""
    return ({"validation": dataset.validation} if dataset.validation else {}) | {"test": dataset.test}


def _write_rows(folder: Path, split: str, samples: Sequence[tuple[str, Sample]]) -> None:
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for number, (client, sample) in enumerate(samples):
            content = dict(_stored(folder, f"{split}-{number:07d}", sample))
            row = {role: getattr(sample, role) for role in ROLES} | {"client": client, "options": list(sample.options)} | content
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _stored(folder: Path, name: str, sample: Sample) -> Iterator[tuple[str, str]]:
    """Content by modality: text as it is, all else as the name of a file."""
    for modality, value in sample.content.items():
        yield modality, value if isinstance(value, str) else _stored_file(folder, f"files/{name}-{modality}", value)


def _stored_file(folder: Path, stem: str, value: Picture) -> str:
    """Files and bytes are copied; what exists in memory only is a picture."""
    if isinstance(value, Path):
        shutil.copyfile(value, folder / f"{stem}{value.suffix}")
        return f"{stem}{value.suffix}"
    if isinstance(value, bytes):
        (folder / stem).write_bytes(value)
        return stem
    buffer = io.BytesIO()
    open_image(value).save(buffer, "PNG")
    (folder / f"{stem}.png").write_bytes(buffer.getvalue())
    return f"{stem}.png"


def _experiment(data: FederatedData, folder: Path, settings: Record) -> str:
    """The settings, with the data read from the folder, by client and as they are."""
    dataset: Dataset = data.dataset
    columns = {role: role for role in ROLES} | {modality: modality for modality in dataset.modalities}
    files = {split: f"{split}.jsonl" for split in ("train", *_held_back(dataset))}
    options = files | {"columns": columns, "metric": dataset.metric, "keep_empty": True}
    # What is in the files is all that there is: nothing more is held out, whether they have a validation part or not.
    stated = {"dataset": "jsonl", "root": str(folder), "prompt": settings["data"]["prompt"], "validation_share": 0.0, "options": options}
    stated |= {"num_validation": len(dataset.validation)} if dataset.validation else {}
    kept = {key: settings["federation"][key] for key in ("num_clients", "clients_per_round", "num_rounds", "keep_empty")}
    federation = kept | {"scenario": "aligned", "partition": "natural", "min_partition_size": 1}
    return f"# fedmllm train {folder}/experiment.yaml\n" + yaml.safe_dump(
        {**settings, "data": stated, "federation": federation}, sort_keys=False
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
