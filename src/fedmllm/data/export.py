"""Exports a split as files: JSON lines, images and a manifest, from which an experiment can start on any machine."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from fedmllm.data.datasets import Dataset
from fedmllm.data.datasets.columns import ROLES
from fedmllm.data.federated import FederatedData
from fedmllm.data.images import open_image
from fedmllm.files import require_new_folder, written
from fedmllm.types import Picture, Record, Sample


def export(data: FederatedData, folder: Path, record: Record, settings: Record) -> Path:
    """Write a split to a folder, after its scenario has been applied.

    - ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` contain one sample per line.
    - ``files/`` contains all content other than text: files unchanged, and generated or edited images as PNG.
    - ``manifest.json`` contains the split, its origin, and the SHA-256 of every file.
    - ``experiment.yaml`` contains the settings for ``fedmllm train`` on this folder.

    Args:
        data: the split.
        folder: the folder to create. It appears only when everything is written.
        record: the manifest, to which the files' hashes are added.
        settings: the experiment's settings, as in its YAML.

    Returns:
        the path of ``experiment.yaml``.

    Raises:
        RunError: if the folder exists or cannot be created.
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
    """Return the test split, and the validation split if there is one."""
    return ({"validation": dataset.validation} if dataset.validation else {}) | {"test": dataset.test}


def _write_rows(folder: Path, split: str, samples: Sequence[tuple[str, Sample]]) -> None:
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
        for number, (client, sample) in enumerate(samples):
            content = dict(_stored(folder, f"{split}-{number:07d}", sample))
            row = {role: getattr(sample, role) for role in ROLES} | {"client": client, "options": list(sample.options)} | content
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _stored(folder: Path, name: str, sample: Sample) -> Iterator[tuple[str, str]]:
    """Yield each modality and its content: text unchanged, and all other content as the name of a file."""
    for modality, value in sample.content.items():
        yield modality, value if isinstance(value, str) else _stored_file(folder, f"files/{name}-{modality}", value)


def _stored_file(folder: Path, stem: str, value: Picture) -> str:
    """Write content to a file and return its name. Files and bytes are copied, and images in memory become PNG files."""
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
    """Return the settings that read the exported samples, with their clients and without further changes."""
    dataset: Dataset = data.dataset
    columns = {role: role for role in ROLES} | {modality: modality for modality in dataset.modalities}
    files = {split: f"{split}.jsonl" for split in ("train", *_held_back(dataset))}
    options = files | {"columns": columns, "metric": dataset.metric, "keep_empty": True}
    # The files are complete, so nothing more is held out, even if there is no validation split.
    stated = {"dataset": "jsonl", "root": str(folder), "prompt": settings["data"]["prompt"], "validation_share": 0.0, "options": options}
    stated |= {"num_validation": len(dataset.validation)} if dataset.validation else {}
    kept = {key: settings["federation"][key] for key in ("num_clients", "clients_per_round", "num_rounds", "keep_empty")}
    federation = kept | {"scenario": "aligned", "partition": "natural", "min_partition_size": 1}
    return f"# fedmllm train {folder}/experiment.yaml\n" + yaml.safe_dump(
        {**settings, "data": stated, "federation": federation}, sort_keys=False
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
