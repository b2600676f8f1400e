"""Datasets saved by Hugging Face's library: pictures stay encoded until they are opened, and classes are read by name."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bad_rows import bad_rows
from fedmllm.data.datasets import load_dataset
from fedmllm.data.datasets.base import Dataset, DatasetRequest
from fedmllm.data.federated import load
from fedmllm.data.images import open_image
from fedmllm.data.settings import DataConfig
from fedmllm.errors import ConfigError, DataError

COLUMNS = {"image": "scan", "text": "report", "answer": "finding"}
CHOICES = ["benign", "malignant"]
OPTIONS: Mapping[str, Any] = {"test": "test", "columns": COLUMNS, "choices": CHOICES, "question": "Is it suspicious?"}


@pytest.fixture
def hub() -> Any:
    """The library without progress bars."""
    library = pytest.importorskip("datasets", reason="the library of Hugging Face datasets is not installed")
    library.disable_progress_bars()
    return library


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def split(hub: Any, rows: list[dict[str, Any]]) -> Any:
    """Rows with a picture, a text, a class, their own options and a number."""
    features = hub.Features(
        scan=hub.Image(),
        report=hub.Value("string"),
        finding=hub.ClassLabel(names=CHOICES),
        options=hub.List(hub.Value("string")),
        n=hub.Value("int64"),
    )
    columns = {name: [row.get(name) for row in rows] for name in features}
    return hub.Dataset.from_dict(columns, features=features)


def save(hub: Any, root: Path, **splits: list[dict[str, Any]]) -> Path:
    rows = {"train": [{"scan": {"bytes": png(10)}, "report": "Scattered\n densities.", "finding": 0, "n": 7}], **splits}
    rows.setdefault("test", [{"scan": {"bytes": png(20)}, "report": "None.", "finding": 1, "n": 8}])
    hub.DatasetDict({name: split(hub, part) for name, part in rows.items()}).save_to_disk(str(root))
    return root


def read(root: Path, on_bad_sample: Any = "refuse", **changes: Any) -> Dataset:
    options = {key: value for key, value in {**OPTIONS, **changes}.items() if value is not None}
    return load_dataset("huggingface", DatasetRequest(root, 0, on_bad_sample=on_bad_sample, options=options))


def problems(root: Path, **changes: Any) -> list[str]:
    return bad_rows(read, root, **changes)


def test_a_row_becomes_a_sample(hub: Any, tmp_path: Path) -> None:
    dataset = read(save(hub, tmp_path / "own"))
    (sample,) = dataset.train

    assert (sample.id, sample.question, sample.answer, sample.options) == (
        "train-0",
        "Is it suspicious?",
        "benign",
        ("benign", "malignant"),
    )
    assert sample.content == {"image": png(10), "text": "Scattered densities."}
    assert [s.answer for s in dataset.test] == ["malignant"]
    assert (dataset.name, dataset.metric, dataset.modalities) == ("huggingface", "auc", ("image", "text"))


def test_pictures_stay_encoded_until_opened(hub: Any, tmp_path: Path) -> None:
    """Otherwise the second row, whose picture is damaged, could not be read at all."""
    rows = [{"scan": {"bytes": png(10)}, "report": "x", "finding": 0}, {"scan": {"bytes": b"no picture"}, "report": "x", "finding": 0}]
    good, broken = (sample.content["image"] for sample in read(save(hub, tmp_path / "own", train=rows)).train)

    assert good == png(10)
    assert isinstance(good, bytes)
    assert open_image(good).getpixel((0, 0)) == (10, 90, 200)
    with pytest.raises(DataError, match="cannot be decoded"):
        open_image(broken)  # type: ignore[arg-type]


def test_pictures_from_files_are_embedded(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.png").write_bytes(png(30))
    rows = [{"scan": str(tmp_path / "elsewhere.png"), "report": "x", "finding": 0}]
    root = save(hub, tmp_path / "own", train=rows)
    (tmp_path / "elsewhere.png").unlink()

    assert read(root).train[0].content["image"] == png(30)


def test_pictures_can_be_separate_files_named_in_a_text_column(hub: Any, tmp_path: Path) -> None:
    rows = [{"scan": name, "finding": "benign"} for name in ("a.png", "../b.png", "c.png")]
    hub.DatasetDict(train=hub.Dataset.from_list(rows), test=hub.Dataset.from_list(rows[:1])).save_to_disk(str(tmp_path / "own"))
    (tmp_path / "own" / "a.png").touch()
    columns = {"image": "scan", "answer": "finding"}

    assert problems(tmp_path / "own", columns=columns) == [
        "train[1]: scan must be a path inside own/, got '../b.png'",
        "train[2]: scan 'c.png' is not a file in own/",
    ]
    (sample,) = read(tmp_path / "own", "skip", columns=columns).train
    assert sample.content == {"image": tmp_path / "own" / "a.png"}


def test_a_picture_that_is_not_embedded_must_be_inside_the_folder(hub: Any, tmp_path: Path) -> None:
    """A saved path could name any file on the machine."""
    (tmp_path / "elsewhere.png").write_bytes(png(30))
    rows = split(hub, [{"scan": str(tmp_path / "elsewhere.png"), "report": "x", "finding": 0}])
    # As other writers of the format do. The library embeds the files when it saves.
    table = rows.with_format("arrow")[:]
    features = hub.Features({**rows.features, "scan": {"bytes": hub.Value("binary"), "path": hub.Value("string")}})
    plain = hub.Dataset.from_dict(table.to_pydict(), features=features)
    hub.DatasetDict(train=plain, test=plain).save_to_disk(str(tmp_path / "own"))

    assert problems(tmp_path / "own")[0] == f"train[0]: scan must be a path inside own/, got '{tmp_path / 'elsewhere.png'}'"


def test_missing_modalities_classes_and_options(hub: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"scan": None, "report": "x", "finding": 0, "options": ["benign", "none"]},
        {"scan": {"bytes": png(1)}, "report": "", "finding": 1, "options": ["a", "malignant"]},
    ]
    root = save(hub, tmp_path / "own", train=rows)

    columns = {**COLUMNS, "options": "options"}
    dataset = read(root, test=None, test_share=0.5, columns=columns, choices=None)
    samples = sorted((*dataset.train, *dataset.test), key=lambda sample: sample.id)
    assert [(s.id, s.modalities, s.options) for s in samples] == [
        ("train-0", ("text",), ("benign", "none")),
        ("train-1", ("image",), ("a", "malignant")),
    ]


@pytest.mark.parametrize("label", [-1, None])
def test_an_undefined_class_is_a_bad_row(label: int | None, hub: Any, tmp_path: Path) -> None:
    """The library writes the hidden labels of a test split as -1."""
    row = {"scan": {"bytes": png(1)}, "report": "x", "finding": label}

    assert problems(save(hub, tmp_path / "own", test=[row])) == ["test[0]: finding must be one of benign, malignant, got None"]


def test_a_dataset_without_splits_is_the_training_split(hub: Any, tmp_path: Path) -> None:
    split(hub, [{"report": f"{i}", "finding": i % 2, "n": i} for i in range(10)]).save_to_disk(str(tmp_path / "own"))
    dataset = read(tmp_path / "own", test=None, columns={**COLUMNS, "id": "n"})

    assert (len(dataset.train), len(dataset.test)) == (8, 2)
    assert {s.id for s in (*dataset.train, *dataset.test)} == {str(i) for i in range(10)}


def test_a_folder_without_a_saved_dataset_is_refused(hub: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root: .* contains no dataset written by save_to_disk"):
        read(tmp_path)
    root = save(hub, tmp_path / "own")
    with pytest.raises(ConfigError, match=r"data\.options: 'dev' is not a split of .*; its splits are train, test"):
        read(root, test="dev")
    with pytest.raises(ConfigError, match=r"image: no row has a field picture$"):
        read(root, columns={**COLUMNS, "image": "picture"})


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"splits": 7}', b"\xff"])
@pytest.mark.parametrize("file", ["dataset_dict.json", "train/state.json", "train/dataset_info.json", "train/data-00000-of-00001.arrow"])
def test_a_damaged_dataset_is_refused(file: str, content: bytes, hub: Any, tmp_path: Path) -> None:
    (save(hub, tmp_path / "own") / file).write_bytes(content)

    with pytest.raises((ConfigError, DataError)):
        read(tmp_path / "own")


def test_a_missing_library_is_named_with_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(ConfigError, match=r"huggingface needs the datasets library: pip install 'fedmllm\[datasets\]'"):
        read(tmp_path)


def test_a_folder_of_parquet_files_has_its_own_message(hub: Any, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").touch()
    with pytest.raises(ConfigError, match=r"read its Parquet files with datasets\.load_dataset and save that"):
        load_dataset("huggingface", DatasetRequest(tmp_path, 0, options=OPTIONS))


def test_a_damaged_picture_in_a_list_is_skipped_like_others(hub: Any, tmp_path: Path) -> None:
    """Lists with one picture are read. The library would decode them while rows are listed, and fail."""
    features = hub.Features(scan=hub.List(hub.Image()), report=hub.Value("string"), finding=hub.ClassLabel(names=CHOICES))
    scans = [[{"bytes": png(10)}], [{"bytes": b"no picture"}], [], [{"bytes": png(1)}, {"bytes": png(2)}]]
    rows = {"scan": scans, "report": list("abcd"), "finding": [0, 1, 0, 1]}
    part = hub.Dataset.from_dict(rows, features=features)
    hub.DatasetDict({"train": part, "test": part.select([0])}).save_to_disk(str(tmp_path / "own"))
    assert problems(tmp_path / "own") == ["train[3]: scan must be one file, got a list of 2"]
    data = DataConfig(dataset="huggingface", root=tmp_path / "own", options=OPTIONS, on_bad_sample="skip")
    found = load(data, 0)
    assert [sorted(s.content) for s in found.train] == [["image", "text"], ["text"]]
    assert "1 sample(s) skipped for 1 image(s) that cannot be used" in found.notes
