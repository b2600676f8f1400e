"""A split that is written as files is read back with the same samples at the same clients."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData, federate
from fedmllm.data.images import open_image
from fedmllm.errors import RunError
from fedmllm.reports.split import export_split
from fedmllm.types import Sample

VQA = {"dataset": "digits-vqa", "num_train": 60, "num_test": 8}


def experiment(data: dict[str, Any] | None = None, **federation: Any) -> Experiment:
    settings = {"num_clients": 3, "min_partition_size": 4, "scenario": "missing-0.3", **federation}
    return Experiment.parse({"data": data or {"num_train": 60, "num_test": 8}, "federation": settings, "seed": 3})


def split(settings: Experiment) -> FederatedData:
    return federate(settings.data, settings.federation, settings.seed)


def described(sample: Sample) -> tuple[object, ...]:
    picture = sample.content.get("image")
    pixels = None if picture is None else open_image(picture).tobytes()
    return (
        sample.id,
        sample.question,
        sample.options,
        sample.answer,
        sample.category,
        sample.answer_type,
        sample.content.get("text"),
        pixels,
    )


@pytest.mark.parametrize(
    ("data", "federation"),
    [
        (None, {}),
        (None, {"heterogeneity": ["noise-0.5", "typos"]}),
        (None, {"keep_empty": True, "scenario": "missing-0.6"}),
        (VQA, {"scenario": "aligned-0.5"}),
        ({"dataset": "mixture", "options": {"parts": [VQA, {"dataset": "digits-claims", "num_train": 60, "num_test": 20}]}}, {}),
    ],
)
def test_an_export_reads_back_unchanged(tmp_path: Path, data: dict[str, Any] | None, federation: dict[str, Any]) -> None:
    before = experiment(data, **federation)
    after = Experiment.load(export_split(before, tmp_path / "out"))
    written, read = split(before), split(after)
    assert {k: list(map(described, v)) for k, v in written.clients.items()} == {k: list(map(described, v)) for k, v in read.clients.items()}
    assert list(map(described, written.dataset.test)) == list(map(described, read.dataset.test))
    assert written.dataset.validation
    assert list(map(described, written.dataset.validation)) == list(map(described, read.dataset.validation))
    assert read.dataset.metric == written.dataset.metric
    assert [s.domain for s in read.dataset.test] == [s.domain for s in written.dataset.test]
    assert (after.seed, after.training, after.algorithm) == (before.seed, before.training, before.algorithm)


def test_the_manifest_has_a_digest_of_every_file(tmp_path: Path) -> None:
    export_split(experiment(), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    assert manifest["seed"] == 3
    assert "torch" in manifest["versions"]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="already exists"):
        export_split(experiment(), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
