"""NLVR: rows that are read and refused, and the real files where they are available."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bad_rows import bad_rows
from fedmllm.data.datasets import load_dataset
from fedmllm.data.datasets.base import DatasetRequest
from fedmllm.data.datasets.nlvr import load
from fedmllm.data.images import open_image
from fedmllm.errors import ConfigError
from fedmllm.types import Sample

Line = dict[str, Any]


def line(identifier: str, label: str = "true", **changes: object) -> Line:
    return {"sentence": "There is a box.", "label": label, "identifier": identifier, "directory": "2", "evals": {"r1": label}, **changes}


def write(root: Path, **files: list[Line]) -> Path:
    """The files of each split, and the picture with box order 0 of every row with a valid name."""
    for split, lines in {"dev": [line("15-0"), line("15-1", "false")], "test": [line("27-3")], **files}.items():
        (root / split / "images" / "2").mkdir(parents=True, exist_ok=True)
        (root / split / f"{split}.json").write_text("".join(json.dumps(one) + "\n" for one in lines))
        for one in lines:
            if "/" not in str(one.get("identifier", "/")):
                (root / split / "images" / "2" / f"{split}-{one['identifier']}-0.png").touch()
    return root


problems = partial(bad_rows, load)
"""The bad rows of a request."""


def test_a_row_becomes_a_sample(tmp_path: Path) -> None:
    dataset = load(DatasetRequest(write(tmp_path), 0, validation_share=0))

    def sample(split: str, identifier: str, answer: str, client: str) -> Sample:
        content = {"image": tmp_path / f"{split}/images/2/{split}-{identifier}-0.png", "text": "There is a box."}
        question = "Is it true?"
        return Sample(f"nlvr-{split}-{identifier}", question, answer, content, ("no", "yes"), answer, client=client)

    assert dataset.train == (sample("dev", "15-0", "yes", "15"), sample("dev", "15-1", "no", "15"))
    assert dataset.test == (sample("test", "27-3", "yes", "27"),)
    assert (dataset.name, dataset.metric, dataset.modalities) == ("nlvr", "auc", ("image", "text"))
    assert load_dataset("nlvr", DatasetRequest(tmp_path, 0, validation_share=0)) == dataset


def test_the_training_file_is_preferred_if_it_exists(tmp_path: Path) -> None:
    write(tmp_path)
    assert load(DatasetRequest(tmp_path, 0, validation_share=0)).notes[0] == "trained on dev, tested on test"

    write(tmp_path, train=[line("1-0")])
    dataset = load(DatasetRequest(tmp_path, 0, validation_share=0))
    assert ([s.id for s in dataset.train], dataset.notes) == (
        ["nlvr-train-1-0"],
        (
            "trained on train, tested on test, validated on dev",
            "train: false and true sentences: 0 / 1",
            "test: false and true sentences: 0 / 1, published: 434 / 556",
            "dev: false and true sentences: 1 / 1, published: 442 / 547",
        ),
    )
    assert all(sample.id.startswith("nlvr-dev-") for sample in dataset.validation)


def test_no_sentence_is_both_trained_on_and_validated_on(tmp_path: Path) -> None:
    asked = {"dev": [line(f"{i}-{k}") for i in range(60) for k in range(3)], "test": [line(f"{i}-0") for i in range(100, 140)]}
    write(tmp_path, **asked)
    dataset = load(DatasetRequest(tmp_path, 0))
    assert len(dataset.validation) == 18
    assert not {s.client for s in dataset.validation} & {s.client for s in dataset.train}


def test_line_ends_blank_lines_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    before = load(DatasetRequest(write(tmp_path), 0, validation_share=0))
    path = tmp_path / "dev" / "dev.json"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + path.read_bytes().replace(b"\n", b"\r\n \r\n"))

    assert load(DatasetRequest(tmp_path, 0, validation_share=0)) == before


def test_a_numeric_directory_is_read(tmp_path: Path) -> None:
    assert len(load(DatasetRequest(write(tmp_path, dev=[line("15-0", directory=2)]), 0, validation_share=0)).train) == 1


NUMBERS = "identifier and directory must be numbers as in 1572-0 and 2, got "
BAD = {
    "a boolean for a label": (line("9-0", label=True), "label must be one of false, true, got True"),  # type: ignore[arg-type]
    "label of another case": (line("9-0", "True"), "label must be one of false, true, got 'True'"),
    "label empty": (line("9-0", ""), "label must be one of false, true, got ''"),
    "no words": (line("9-0", sentence=" "), "sentence must be text that is not empty, got ' '"),
    "identifier twice": (line("15-0"), "id must be unique, but 'nlvr-dev-15-0' also occurs at dev.json:1"),
    "identifier of one number": (line("9"), NUMBERS + "'9' and '2'"),
    "identifier with a path": (line("9-0/../../x-0"), NUMBERS + "'9-0/../../x-0' and '2'"),
    "directory above": (line("9-0", directory=".."), NUMBERS + "'9-0' and '..'"),
    "directory with a null character": (line("9-0", directory="2\0"), NUMBERS + "'9-0' and '2\\x00'"),
    "a picture that is not there": (line("9-0", directory="3"), "image 'dev/images/3/dev-9-0-0.png' is not a file in nlvr/"),
    "a name too long": (line("9-0", directory="3" * 300), "image 'dev/images/3333"),
    "no directory, as in hidden.json": ({k: v for k, v in line("9-0").items() if k != "directory"}, "lacks directory"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_skipped(row: Line, message: str, tmp_path: Path) -> None:
    root = write(tmp_path / "nlvr", dev=[line("15-0"), row, line("15-1")])

    (problem,) = problems(DatasetRequest(root, 0, validation_share=0))
    assert problem.startswith(f"dev.json:2: {message}")
    dataset = load(DatasetRequest(root, 0, on_bad_sample="skip", validation_share=0))
    assert ([s.id for s in dataset.train], dataset.notes[1:3]) == (["nlvr-dev-15-0", "nlvr-dev-15-1"], ("1 bad row(s) skipped", problem))


def test_all_bad_rows_of_both_files_are_listed_at_once(tmp_path: Path) -> None:
    write(tmp_path, test=[line("27-3", "maybe")])
    (tmp_path / "dev/dev.json").write_bytes(b'{"label": \xff}\n\n"row"\n{}\n')

    assert [problem.split(" (")[0] for problem in problems(DatasetRequest(tmp_path, 0, validation_share=0))] == [
        "dev.json:1: must be a JSON object in UTF-8",
        "dev.json:3: must be an object with keys, got 'row'",
        "dev.json:4: lacks label",
        "test.json:1: label must be one of false, true, got 'maybe'",
    ]


@pytest.mark.parametrize("missing", ["dev/images", "dev/dev.json", "test/test.json"])
def test_missing_files_are_named(missing: str, tmp_path: Path) -> None:
    (write(tmp_path) / missing).rename(tmp_path / "elsewhere")

    assert f"{missing} (missing)" in problems(DatasetRequest(tmp_path, 0, validation_share=0))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    assert problems(DatasetRequest(write(tmp_path, test=[]), 0, validation_share=0)) == ["the test split is empty"]


def test_there_are_no_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.options\.test: "):
        load(DatasetRequest(write(tmp_path), 0, options={"test": "hidden"}, validation_share=0))


@pytest.mark.data
def test_the_real_files_hold_the_published_sentences(real_data: Path) -> None:
    dataset = load(DatasetRequest(real_data / "nlvr", 0, validation_share=0))

    assert (len(dataset.train), len(dataset.test)) == (989, 990)
    assert Counter(s.answer for s in dataset.train) == {"yes": 547, "no": 442}
    assert Counter(s.answer for s in dataset.test) == {"yes": 556, "no": 434}
    assert dataset.notes[1:] == (
        "dev: false and true sentences: 442 / 547, as published",
        "test: false and true sentences: 434 / 556, as published",
    )
    assert not {s.client for s in dataset.train} & {s.client for s in dataset.test}
    image = dataset.test[0].content["image"]
    assert isinstance(image, Path)
    assert (open_image(image).mode, open_image(image).size) == ("RGB", (400, 100))
