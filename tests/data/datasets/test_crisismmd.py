"""CrisisMMD in both variants: rows that are read and rows that are refused. No row here comes from the dataset."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from bad_rows import bad_rows
from fedmllm.data.datasets import load_dataset
from fedmllm.data.datasets.base import DatasetRequest
from fedmllm.data.datasets.crisismmd import FILES, load
from fedmllm.errors import ConfigError

COLUMNS = ("event_name", "tweet_id", "image_id", "tweet_text", "image", "label", "label_text", "label_image", "label_text_image")
EIGHT = (
    "affected individuals",
    "infrastructure and utility damage",
    "injured or dead people",
    "missing or found people",
    "rescue volunteering or donation effort",
    "vehicle damage",
    "other relevant information",
    "not humanitarian",
)
FIVE = tuple(name for name in EIGHT if name not in ("injured or dead people", "missing or found people", "vehicle damage"))


def tweet(number: int, text: str, label_image: str = "vehicle_damage", **changes: str) -> str:
    """A line of a file. ``label_text`` differs from ``label_image``; ``label`` is one of the two."""
    row = {
        "event_name": "hurricane_irma",
        "tweet_id": f"9057{number:05d}",
        "image_id": f"9057{number:05d}_0",
        "tweet_text": text,
        "image": f"data_image/hurricane_irma/9_9_2017/9057{number:05d}_0.jpg",
        "label": "not_humanitarian",
        "label_text": "not_humanitarian",
        "label_image": label_image,
        "label_text_image": "Negative",
    }
    return "\t".join({**row, **changes}[column] for column in COLUMNS)


def write(root: Path, variant: str = "full", end: str = "\n", **files: list[str]) -> Path:
    """The files of a variant, with the picture of every line."""
    for split, lines in {"train": [tweet(1, "one")], "test": [tweet(2, "two")], **files}.items():
        path = root / FILES[variant].format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(line + end for line in ["\t".join(COLUMNS), *lines]).encode("utf-8", "surrogateescape"))
    (root / "data_image" / "hurricane_irma" / "9_9_2017").mkdir(parents=True, exist_ok=True)
    for number in range(1, 10):
        (root / f"data_image/hurricane_irma/9_9_2017/9057{number:05d}_0.jpg").touch()
    return root


def texts(root: Path) -> list[object]:
    return [sample.content.get("text") for sample in load(DatasetRequest(root, 0, validation_share=0)).train]


problems = partial(bad_rows, load)
"""The bad rows of a request."""


def test_a_row_becomes_a_sample(tmp_path: Path) -> None:
    dataset = load(DatasetRequest(write(tmp_path), 0, validation_share=0))
    (sample,) = dataset.train

    assert (sample.id, sample.client, sample.answer_type) == ("crisismmd-train-905700001_0", "hurricane_irma", "choice")
    assert (sample.answer, sample.category, sample.options) == ("vehicle damage", "vehicle damage", EIGHT)
    assert sample.content == {"image": tmp_path / "data_image/hurricane_irma/9_9_2017/905700001_0.jpg", "text": "one"}
    assert (dataset.metric, dataset.modalities, dataset.notes[0]) == (
        "macro_f1",
        ("image", "text"),
        "full variant, label_image, evaluated on test",
    )
    assert load_dataset("crisismmd", DatasetRequest(tmp_path, 0, validation_share=0)) == dataset


def test_quotation_marks_are_ordinary_characters(tmp_path: Path) -> None:
    """Read as CSV, the first row would swallow the second, and the third would lose its quotation marks."""
    write(tmp_path, train=[tweet(1, '"'), tweet(2, '"open'), tweet(3, '"closed"'), tweet(4, 'a 7" wave'), tweet(5, 'he said ""')])

    assert texts(tmp_path) == ['"', '"open', '"closed"', 'a 7" wave', 'he said ""']


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Fire! https://t.co/aB3 http://x.org/?a=b&c=d", "Fire!"),
        ("before https://t.co/aB3 after", "before after"),
        ("RT @who: https://t.co/aB3… #irma", "RT @who: #irma"),
        ("no address: https:// t.co", "no address: https:// t.co"),
        ("two\rlines\x85and\u2028more", "two lines and more"),
        (" padded   words ", "padded words"),
        ("🌀 Größe &amp;", "🌀 Größe &amp;"),
        ("x" * 140_000, "x" * 140_000),
    ],
)
def test_only_web_addresses_are_removed_from_text(text: str, read: str, tmp_path: Path) -> None:
    assert texts(write(tmp_path, train=[tweet(1, text)])) == [read]


def test_a_tweet_of_addresses_only_has_no_text(tmp_path: Path) -> None:
    dataset = load(
        DatasetRequest(write(tmp_path, train=[tweet(1, "https://t.co/a https://t.co/b"), tweet(3, "words")]), 0, validation_share=0)
    )

    assert [sample.modalities for sample in dataset.train] == [("image",), ("image", "text")]
    assert "1 tweet(s) contain only web addresses, so their text is missing" in dataset.notes


def test_line_ends_blank_lines_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    before = load(DatasetRequest(write(tmp_path), 0, validation_share=0))
    write(tmp_path, end="\r\n\r\n")
    path = tmp_path / FILES["full"].format(split="train")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    assert load(DatasetRequest(tmp_path, 0, validation_share=0)) == before


@pytest.mark.parametrize(
    ("options", "answers", "notes"),
    [
        ({}, {"missing or found people"}, "full variant, label_image, evaluated on test"),
        ({"test": "dev"}, {"affected individuals"}, "full variant, label_image, evaluated on dev"),
        ({"label": "label_text"}, {"not humanitarian"}, "full variant, label_text, evaluated on test"),
        ({"label": "label", "test": "dev"}, {"other relevant information"}, "full variant, label, evaluated on dev"),
    ],
)
def test_the_label_and_the_file_can_be_chosen(options: dict[str, str], answers: set[str], notes: str, tmp_path: Path) -> None:
    dev = [tweet(3, "x", "affected_individuals", label="other_relevant_information")]
    dataset = load(
        DatasetRequest(write(tmp_path, test=[tweet(2, "y", "missing_or_found_people")], dev=dev), 0, options=options, validation_share=0)
    )

    assert {sample.answer for sample in dataset.test} == answers
    assert dataset.notes[0] == notes


@pytest.mark.parametrize(
    ("variant", "options", "labels"), [("full", EIGHT, [0, 1, 2, 3, 4, 5, 6, 7]), ("agreed", FIVE, [0, 1, 0, 0, 2, 1, 3, 4])]
)
def test_the_agreed_variant_has_five_of_eight_classes(variant: str, options: tuple[str, ...], labels: list[int], tmp_path: Path) -> None:
    train = [tweet(i, "x", name.replace(" ", "_")) for i, name in enumerate(EIGHT, 1)]
    samples = load(DatasetRequest(write(tmp_path, variant, train=train), 0, options={"variant": variant}, validation_share=0)).train

    assert [sample.label for sample in samples] == labels
    assert {sample.options for sample in samples} == {options}


def test_pictures_may_be_in_their_archives_folder(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "CrisisMMD_v2.0").mkdir()
    (tmp_path / "data_image").rename(tmp_path / "CrisisMMD_v2.0" / "data_image")

    def image() -> object:
        return load(DatasetRequest(tmp_path, 0, validation_share=0)).train[0].content["image"]

    picture = tmp_path / "CrisisMMD_v2.0/data_image/hurricane_irma/9_9_2017/905700001_0.jpg"
    assert image() == picture
    (tmp_path / "crisismmd_datasplit_all").rename(tmp_path / "CrisisMMD_v2.0" / "crisismmd_datasplit_all")
    assert image() == picture


def test_counts_are_compared_with_the_published_ones(tmp_path: Path) -> None:
    notes = load(DatasetRequest(write(tmp_path), 0, validation_share=0)).notes

    assert notes[1:] == (
        "train: rows: 1, published: 13,608",
        "test: rows: 1, published: 2,237",
        "test: rows by class: 0 / 0 / 0 / 0 / 0 / 1 / 0 / 0, published: 88 / 458 / 10 / 3 / 256 / 36 / 331 / 1,055",
    )


BAD = {
    "label of another spelling": (tweet(3, "x", "Vehicle_Damage"), "label_image must be one of affected_individuals, "),
    "label of the text alone": (tweet(3, "x", ""), "label_image must be one of affected_individuals, "),
    "no text": (tweet(3, " "), "tweet_text must be text that is not empty"),
    "no event": (tweet(3, "x", event_name=""), "event_name must be text that is not empty"),
    "id of another row": (tweet(3, "x", image_id="905700001_0"), "id must be unique, but 'crisismmd-train-905700001_0' also occurs at "),
    "no such picture": (tweet(3, "x", image="data_image/gone.jpg"), "image 'data_image/gone.jpg' is not a file in crisis/"),
    "picture above": (tweet(3, "x", image="data_image/../../x.jpg"), "image must be a path inside crisis/"),
    "picture elsewhere": (tweet(3, "x", image="/etc/hostname"), "image must be a path inside crisis/, got '/etc/hostname'"),
    "null character": (tweet(3, "x", image="data_image\0"), "image must be a path inside crisis/, got 'data_image\\x00'"),
    "no UTF-8": (tweet(3, "x\udcff"), "must be in UTF-8"),
    "a tab in the text": (tweet(3, "x\ty"), "must have 9 fields, got 10"),
    "cut short": (tweet(3, "x")[:40], "must have 9 fields, got 5"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_skipped(row: str, message: str, tmp_path: Path) -> None:
    root = write(tmp_path / "crisis", train=[tweet(1, "x"), "", row, tweet(4, "y")])

    (problem,) = problems(DatasetRequest(root, 0, validation_share=0))
    assert problem.startswith(f"task_humanitarian_text_img_train.tsv:4: {message}")
    dataset = load(DatasetRequest(root, 0, on_bad_sample="skip", validation_share=0))
    assert ([sample.content["text"] for sample in dataset.train], dataset.notes[1:3]) == (["x", "y"], ("1 bad row(s) skipped", problem))


def test_a_missing_column_is_named_for_its_rows_in_both_files(tmp_path: Path) -> None:
    write(tmp_path)
    for split in ("train", "test"):
        path = tmp_path / FILES["full"].format(split=split)
        path.write_text(path.read_text().replace("label_image\t", "label_picture\t"))

    files = [f"task_humanitarian_text_img_{split}.tsv:2: lacks label_image" for split in ("train", "test")]
    assert problems(DatasetRequest(tmp_path, 0, validation_share=0)) == files
    assert problems(DatasetRequest(tmp_path, 0, on_bad_sample="skip", validation_share=0)) == files


@pytest.mark.parametrize("missing", ["data_image", *(FILES["full"].format(split=split) for split in ("train", "test"))])
def test_missing_files_are_named(missing: str, tmp_path: Path) -> None:
    (write(tmp_path) / missing).rename(tmp_path / "elsewhere")

    assert f"{missing} (missing)" in problems(DatasetRequest(tmp_path, 0, validation_share=0))


def test_an_empty_split_and_unknown_options_are_refused(tmp_path: Path) -> None:
    assert problems(DatasetRequest(write(tmp_path, test=[]), 0, validation_share=0)) == ["the test split is empty"]
    for options in ({"variant": "both"}, {"label": "label_text_image"}, {"test": "train"}, {"split": "dev"}):
        with pytest.raises(ConfigError, match=rf"data\.options\.{next(iter(options))}: "):
            load(DatasetRequest(tmp_path, 0, options=options, validation_share=0))
