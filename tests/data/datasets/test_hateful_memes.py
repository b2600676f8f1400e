"""Hateful Memes in both releases: rows that are read and rows that are refused. No row here comes from the dataset."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bad_rows import bad_rows
from fedmllm.data.datasets import load_dataset
from fedmllm.data.datasets.base import DatasetRequest
from fedmllm.data.datasets.hateful_memes import load
from fedmllm.errors import ConfigError
from fedmllm.types import Sample

Line = dict[str, Any]

FIRST = ("train", "dev")
LATER = ("train", "dev_seen", "dev_unseen", "test_seen", "test_unseen")


def line(number: int, label: int | None, text: str, padded: bool) -> Line:
    """A row as the releases write it. The first has integer ids, the later one pads them; both pad the picture's name."""
    named = {"id": f"{number:05d}" if padded else number, "img": f"img/{number:05d}.png"}
    return {**named, **({} if label is None else {"label": label}), "text": text}


def write(root: Path, files: dict[str, list[Line]]) -> Path:
    (root / "img").mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        for one in lines:
            (root / "img" / f"{int(one['id']):05d}.png").touch()
    return root


def release(root: Path, names: tuple[str, ...]) -> Path:
    """Two training rows and two rows in each other file. The first release's test file has no labels."""
    padded = names == LATER
    files = {name: [line(10 * i + 1, 0, f"first of {name}", padded), line(10 * i + 2, 1, "second", padded)] for i, name in enumerate(names)}
    return write(root, files if padded else {**files, "test": [line(91, None, "no label", padded)]})


problems = partial(bad_rows, load)
"""The bad rows of a request."""


def meme(split: str, number: int, answer: str, text: str, root: Path) -> Sample:
    image = f"img/{number:05d}.png"
    content = {"image": root / image, "text": text}
    return Sample(f"hateful_memes-{split}-{image}", "Is it hateful?", answer, content, ("no", "yes"), answer)


@pytest.mark.parametrize(("names", "evaluated", "at"), [(FIRST, "dev", 11), (LATER, "test_seen", 31)])
def test_both_releases_are_recognized_by_their_files(names: tuple[str, ...], evaluated: str, at: int, tmp_path: Path) -> None:
    dataset = load(DatasetRequest(release(tmp_path, names), 0, validation_share=0))

    assert dataset.train == (meme("train", 1, "no", "first of train", tmp_path), meme("train", 2, "yes", "second", tmp_path))
    assert dataset.test == (
        meme(evaluated, at, "no", f"first of {evaluated}", tmp_path),
        meme(evaluated, at + 1, "yes", "second", tmp_path),
    )
    assert (dataset.name, dataset.metric, dataset.modalities) == ("hateful_memes", "auc", ("image", "text"))
    assert dataset.notes[0] == f"read from the {'first' if names == FIRST else 'later'} release, evaluated on {evaluated}"
    assert load_dataset("hateful_memes", DatasetRequest(tmp_path, 0, validation_share=0)) == dataset


def test_the_later_release_is_preferred_where_both_are(tmp_path: Path) -> None:
    """The files are in the same folder. The training file belongs to the release written last."""
    dataset = load(DatasetRequest(release(release(tmp_path, FIRST), LATER), 0, validation_share=0))

    assert dataset.notes[0] == "read from the later release, evaluated on test_seen"


@pytest.mark.parametrize("evaluated", LATER[1:])
def test_every_labeled_file_of_the_later_release_can_be_evaluated_on(evaluated: str, tmp_path: Path) -> None:
    dataset = load(DatasetRequest(release(tmp_path, LATER), 0, options={"test": evaluated}, validation_share=0))

    assert {s.id.split("-")[1] for s in dataset.test} == {evaluated}


@pytest.mark.parametrize(
    ("names", "evaluated", "known"), [(FIRST, "test_seen", "choose from dev$"), (LATER, "dev", "choose from dev_seen, dev_unseen,")]
)
def test_a_file_of_the_other_release_is_refused(names: tuple[str, ...], evaluated: str, known: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"data\.options\.test: {evaluated} is not a labeled file of .*{known}"):
        load(DatasetRequest(release(tmp_path, names), 0, options={"test": evaluated}, validation_share=0))


def test_options_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for options in ({"test": "test"}, {"tests": "dev"}):
        with pytest.raises(ConfigError, match=r"data\.options\.tests?: "):
            load(DatasetRequest(release(tmp_path, LATER), 0, options=options, validation_share=0))


def test_the_form_of_ids_does_not_matter(tmp_path: Path) -> None:
    """The picture's name is the key. Ids may be missing, repeated or of any type."""
    lines = [line(i, 0, "x", True) for i in range(4)]
    write(tmp_path, {"train": lines, "dev": [line(9, 1, "y", False)]})
    keys: list[object] = [7, "7", None, "00007"]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps({**one, "id": key}) for one, key in zip(lines, keys, strict=True)))

    assert [s.id for s in load(DatasetRequest(tmp_path, 0, validation_share=0)).train] == [
        f"hateful_memes-train-img/{i:05d}.png" for i in range(4)
    ]


def test_line_ends_blank_lines_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    before = load(DatasetRequest(release(tmp_path, FIRST), 0, validation_share=0))
    text = (tmp_path / "train.jsonl").read_text().replace("\n", "\r\n\r\n")
    (tmp_path / "train.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())

    assert load(DatasetRequest(tmp_path, 0, validation_share=0)) == before


def test_published_counts_are_recognized_for_each_file(tmp_path: Path) -> None:
    write(tmp_path, {"train": [line(1, 1, "x", False)], "dev": [line(1000 + i, i % 2, "x", False) for i in range(500)]})

    assert load(DatasetRequest(tmp_path, 0, validation_share=0)).notes[1:] == (
        "train: rows without and with hate: 0 / 1, published: 5,450 / 3,050",
        "dev: rows without and with hate: 250 / 250, as published",
    )


BAD = {
    "no label": ({"label": None}, "label must be one of 0, 1, got None"),
    "another label": ({"label": 2}, "label must be one of 0, 1, got 2"),
    "a boolean": ({"label": True}, "label must be one of 0, 1, got True"),
    "a fraction": ({"label": 0.0}, "label must be one of 0, 1, got 0.0"),
    "no words": ({"text": " \n"}, "text must be text that is not empty, got ' \\n'"),
    "half a character": ({"text": "\ud83d"}, "text must be text that is not empty, got '\\ud83d'"),
    "no such picture": ({"img": "img/99999.png"}, "img 'img/99999.png' is not a file in memes/"),
    "the folder of pictures": ({"img": "img"}, "img 'img' is not a file in memes/"),
    "a picture above": ({"img": "../00001.png"}, "img must be a path inside memes/, got '../00001.png'"),
    "a picture elsewhere": ({"img": "/etc/hostname"}, "img must be a path inside memes/, got '/etc/hostname'"),
    "a null character": ({"img": "img/00001.png\0"}, "img must be a path inside memes/, got 'img/00001.png\\x00'"),
    "the picture of another row": ({"img": "img/./00001.png"}, "id must be unique, but "),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_skipped(change: Line, message: str, tmp_path: Path) -> None:
    root = write(tmp_path / "memes", {"train": [line(1, 0, "x", False), line(2, 1, "y", False)], "dev": [line(3, 0, "z", False)]})
    with (root / "train.jsonl").open("a") as file:
        file.write(json.dumps({**line(2, 1, "w", False), **change}) + "\n")

    (problem,) = problems(DatasetRequest(root, 0, validation_share=0))
    assert problem.startswith(f"train.jsonl:3: {message}")
    dataset = load(DatasetRequest(root, 0, on_bad_sample="skip", validation_share=0))
    assert (len(dataset.train), *dataset.notes[1:3]) == (2, "1 bad row(s) skipped", problem)


def test_all_bad_rows_of_both_files_are_listed_at_once(tmp_path: Path) -> None:
    release(tmp_path, LATER)
    (tmp_path / "train.jsonl").write_bytes(b'{"img": "img/00001.png"}\n\n{"img": \xff}\n[]\n')
    (tmp_path / "test_seen.jsonl").write_text('{"label": 1, "text": "x"}\n')

    places = [problem.partition(": ")[::2] for problem in problems(DatasetRequest(tmp_path, 0, validation_share=0))]
    assert [(place, rule.split(" (")[0]) for place, rule in places] == [
        ("train.jsonl:1", "lacks label"),
        ("train.jsonl:3", "must be a JSON object in UTF-8"),
        ("train.jsonl:4", "must be an object with keys, got []"),
        ("test_seen.jsonl:1", "lacks img"),
    ]


def test_the_test_file_without_labels_cannot_be_evaluated_on(tmp_path: Path) -> None:
    """This happens if the first release's test file is renamed."""
    release(tmp_path, FIRST)
    (tmp_path / "test.jsonl").rename(tmp_path / "dev.jsonl")

    assert problems(DatasetRequest(tmp_path, 0, validation_share=0)) == ["dev.jsonl:1: lacks label"]


@pytest.mark.parametrize("missing", ["img", "train.jsonl", "test_seen.jsonl"])
def test_missing_files_are_named(missing: str, tmp_path: Path) -> None:
    (release(tmp_path, LATER) / missing).rename(tmp_path / "elsewhere")

    assert f"{missing} (missing)" in problems(DatasetRequest(tmp_path, 0, validation_share=0))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    release(tmp_path, FIRST)
    (tmp_path / "train.jsonl").write_text("\n")

    assert problems(DatasetRequest(tmp_path, 0, validation_share=0)) == ["the train split is empty"]
