"""Your own files: what the columns mean, what is held out, which settings contradict each other, which rows are refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedmllm.data.datasets import load_dataset
from fedmllm.data.datasets.base import Dataset, DatasetRequest
from fedmllm.errors import ConfigError, DataError
from fedmllm.types import Sample

Record = dict[str, Any]

COLUMNS = {"image": "scan", "text": "report", "question": "asked", "answer": "finding", "client": "site"}
CHOICES = ["benign", "malignant"]
OPTIONS: Mapping[str, Any] = {"train": "train.jsonl", "test": "test.jsonl", "columns": COLUMNS, "choices": CHOICES}
ROW = {"scan": "a/17.png", "report": 'Two\n"dense" areas, left.', "asked": "Is it suspicious?", "finding": "benign", "site": "north"}
TEST = {**ROW, "scan": "18.png", "finding": "malignant", "site": "south"}


def write(root: Path, train: list[Any] | None = None, test: list[Any] | None = None) -> Path:
    """JSON lines, CSV and TSV of the same rows, two pictures and a recording."""
    (root / "a").mkdir(parents=True, exist_ok=True)
    for name in ("a/17.png", "18.png", "19.wav"):
        (root / name).touch()
    for split, rows in {"train": [ROW] if train is None else train, "test": [TEST] if test is None else test}.items():
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
            with (root / f"{split}{suffix}").open("w", encoding="utf-8-sig", newline="") as file:
                table = csv.DictWriter(file, sorted({key for row in rows for key in row}), delimiter=delimiter)
                table.writeheader()
                table.writerows(
                    {key: "|".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()} for row in rows
                )
    return root


def read(root: Path, options: Mapping[str, Any] = OPTIONS, name: str = "jsonl", **request: Any) -> Dataset:
    return load_dataset(name, DatasetRequest(root, 0, options=options, **request))


def problems(root: Path, options: Mapping[str, Any] = OPTIONS, name: str = "jsonl") -> list[str]:
    with pytest.raises(DataError) as error:
        read(root, options, name)
    return [row.removeprefix("  - ") for row in str(error.value).splitlines()[1:]]


@pytest.mark.parametrize(("name", "suffix", "line"), [("jsonl", ".jsonl", 1), ("csv", ".csv", 3), ("csv", ".tsv", 3)])
def test_a_row_becomes_a_sample(name: str, suffix: str, line: int, tmp_path: Path) -> None:
    """In the tables a header precedes it, and it takes two lines."""
    dataset = read(write(tmp_path), {**OPTIONS, "train": f"train{suffix}", "test": f"test{suffix}"}, name)

    def sample(key: str, image: str, answer: str, client: str) -> Sample:
        content = {"image": tmp_path / image, "text": 'Two "dense" areas, left.'}
        return Sample(f"{key}-{line}", "Is it suspicious?", answer, content, ("benign", "malignant"), answer, client=client)

    assert dataset.train == (sample("train", "a/17.png", "benign", "north"),)
    assert dataset.test == (sample("test", "18.png", "malignant", "south"),)
    assert (dataset.name, dataset.metric, dataset.modalities, dataset.notes) == (name, "auc", ("image", "text"), ())


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_options_can_differ_by_row(name: str, tmp_path: Path) -> None:
    """An empty list: the row's answer is free."""
    rows = [
        {"t": "x", "o": ["red", "dark  blue"], "f": "dark blue"},
        {"t": "x", "o": ["a", "b", "c"], "f": "a"},
        {"t": "x", "o": [], "f": "No"},
    ]
    options = {
        "train": f"train.{name}",
        "test": f"test.{name}",
        "columns": {"text": "t", "options": "o", "answer": "f"},
        "question": "Which?",
    }
    dataset = read(write(tmp_path, rows, rows), options, name)

    assert [(s.options, s.answer, s.category, s.answer_type) for s in dataset.train] == [
        (("red", "dark blue"), "dark blue", "dark blue", "choice"),
        (("a", "b", "c"), "a", "a", "choice"),
        ((), "No", "all", "closed"),
    ]
    assert (dataset.metric, {s.question for s in dataset.train}) == ("accuracy", {"Which?"})


def test_answers_can_be_free(tmp_path: Path) -> None:
    columns = {"text": "t", "answer": "f", "category": "k", "answer_type": "how", "domain": "d"}
    rows = [
        {"t": "x", "f": answer, "k": "size", "how": how, "d": "A"} for answer, how in ((12, "open"), ("YES", "open"), ("a b", "closed"))
    ]
    write(tmp_path, rows, rows)

    def told(leave_out: str) -> list[tuple[str, ...]]:
        chosen = {key: column for key, column in columns.items() if key != leave_out}
        dataset = read(tmp_path, {**OPTIONS, "columns": chosen, "question": "?", "choices": []})
        return [(s.answer, s.category, s.answer_type, s.domain) for s in dataset.train]

    assert told("") == [("12", "size", "open", "A"), ("YES", "size", "open", "A"), ("a b", "size", "closed", "A")]
    assert told("answer_type") == [("12", "size", "open", "A"), ("YES", "size", "closed", "A"), ("a b", "size", "open", "A")]
    assert told("category")[0] == ("12", "all", "open", "A")


@pytest.mark.parametrize("nothing", [None, "", " \n", "absent"])
def test_an_empty_field_is_a_missing_modality(nothing: str | None, tmp_path: Path) -> None:
    def without(*keys: str) -> Record:
        row = {**ROW, **dict.fromkeys(keys, nothing)}
        return {key: value for key, value in row.items() if value != "absent"}

    dataset = read(write(tmp_path, [ROW, without("scan"), without("report")]))
    assert [s.modalities for s in dataset.train] == [("image", "text"), ("text",), ("image",)]

    write(tmp_path, [ROW, without("scan", "report")])
    assert problems(tmp_path) == ["train.jsonl:2: all of scan, report are empty; one is needed"]
    assert [s.modalities for s in read(tmp_path, {**OPTIONS, "keep_empty": True}).train] == [("image", "text"), ()]


def test_a_modality_of_another_name_is_a_file(tmp_path: Path) -> None:
    write(tmp_path, [{**ROW, "sound": "19.wav"}, {**ROW, "sound": None}, {**ROW, "sound": "20.wav"}])
    options = {**OPTIONS, "columns": {**COLUMNS, "audio": "sound"}}

    assert problems(tmp_path, options) == [f"train.jsonl:3: sound '20.wav' is no file in {tmp_path.name}/"]
    dataset = read(tmp_path, options, on_bad_sample="skip")
    assert [s.content.get("audio") for s in dataset.train] == [tmp_path / "19.wav", None]
    assert (dataset.modalities, dataset.notes[0]) == (("audio", "image", "text"), "1 bad row(s) skipped")


def test_a_share_is_held_out_where_there_is_no_test_file(tmp_path: Path) -> None:
    write(tmp_path, [ROW] * 20)
    dataset = read(tmp_path, {**OPTIONS, "test": None})
    train, test = ({int(s.id.removeprefix("train-")) for s in split} for split in (dataset.train, dataset.test))

    assert (len(train), len(test), train | test) == (16, 4, set(range(1, 21)))
    assert len(read(tmp_path, {**OPTIONS, "test": None, "test_share": 0.5}).test) == 10
    assert load_dataset("jsonl", DatasetRequest(tmp_path, 1, options={**OPTIONS, "test": None})).test != dataset.test


def test_ids_of_a_column_occur_once_in_both_files(tmp_path: Path) -> None:
    options = {**OPTIONS, "columns": {**COLUMNS, "id": "n"}}

    assert [s.id for s in read(write(tmp_path, [{**ROW, "n": "u"}, {**ROW, "n": 7}], [{**TEST, "n": "v"}]), options).train] == ["7", "u"]
    write(tmp_path, [{**ROW, "n": "u"}, {**ROW, "n": 7}], [{**TEST, "n": "7"}])
    assert problems(tmp_path, options) == ["test.jsonl:1: id must occur once, '7' is also at train.jsonl:2"]


def change(**changes: object) -> dict[str, Any]:
    """The options with some changed; None leaves one out."""
    return {key: value for key, value in {**OPTIONS, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("options", "metric"),
    [
        (change(), "auc"),
        (change(choices=["benign", "malignant", "none"]), "macro_f1"),
        (change(choices=None), "accuracy"),
        (change(metric="macro_f1"), "macro_f1"),
        (change(metric="accuracy"), "accuracy"),
    ],
)
def test_the_headline_score_follows_the_choices(options: dict[str, Any], metric: str, tmp_path: Path) -> None:
    assert read(write(tmp_path), options).metric == metric


CONTRADICTIONS = {
    "no columns": (change(columns=None), "columns: Field required"),
    "no answer": (change(columns={"text": "report", "question": "asked"}), "columns: answer is needed"),
    "no modality": (change(columns={"answer": "finding", "question": "asked"}), "columns: name at least one modality"),
    "two questions": (change(question="?"), "question: give either this or columns.question"),
    "no question": (change(columns={"text": "report", "answer": "finding"}), "question: give either this or columns.question"),
    "two kinds of options": (change(columns={**COLUMNS, "options": "o"}), "choices: give either these or columns.options"),
    "one choice": (change(choices=["benign"]), "choices: two or more different ones are needed, not ['benign']"),
    "choices repeated": (change(choices=["a", "b", "a"]), "choices: two or more different ones are needed"),
    "a choice no answer can be": (change(choices=["a", "b "]), "choices: 'b ' must have words and single spaces"),
    "an empty choice": (change(choices=["a", ""]), "choices: '' must have words and single spaces"),
    "YAML's yes and no": (change(choices=[True, False]), "choices.0: Input should be a valid string"),
    "more choices than letters": (change(choices=[str(i) for i in range(63)]), "choices: there are 63, at most 62 can be lettered"),
    "auc of three": (change(metric="auc", choices=["a", "b", "c"]), "metric: auc needs exactly two choices"),
    "auc of free answers": (change(metric="auc", choices=None), "metric: auc needs exactly two choices"),
    "macro_f1 of free answers": (change(metric="macro_f1", choices=None), "metric: macro_f1 needs choices"),
    "an unknown metric": (change(metric="f1"), "metric: Input should be"),
    "tested on what is trained on": (change(test="train.jsonl"), "test: must be another file than train"),
    "a file above": (change(train="../train.jsonl"), "train: must lie inside root, not '../train.jsonl'"),
    "a file elsewhere": (change(test="/data/test.jsonl"), "test: must lie inside root, not '/data/test.jsonl'"),
    "no share": (change(test=None, test_share=1), "test_share: Input should be less than 1"),
    "unknown": (change(labels=["a"]), "labels: Extra inputs are not permitted"),
}


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_contradictory_settings_are_refused(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(write(tmp_path), options, name)
    assert message in str(error.value)


@pytest.mark.parametrize(("role", "name"), [("answer", "jsonl"), ("image", "jsonl"), ("client", "csv"), ("text", "csv")])
def test_a_column_that_no_row_has_is_named_beside_those_there_are(role: str, name: str, tmp_path: Path) -> None:
    options = change(columns={**COLUMNS, role: "misspelled"}, train=f"train.{name}", test=f"test.{name}")
    fields = r"data\.options\.columns: the fields are asked, finding, report, scan, site\n"

    with pytest.raises(ConfigError, match=rf"{fields}  - {role}: no row has a field misspelled$"):
        read(write(tmp_path), options, name)


BAD: dict[str, tuple[object, str]] = {
    "answer of another case": ({**ROW, "finding": "Benign"}, "finding must be one of benign, malignant, is 'Benign'"),
    "answer missing": ({key: value for key, value in ROW.items() if key != "finding"}, "lacks finding"),
    "question empty": ({**ROW, "asked": ""}, "asked must be text that is not empty, is ''"),
    "text a list": ({**ROW, "report": ["x"]}, "report must be text that is not empty, is ['x']"),
    "picture above": ({**ROW, "scan": "../18.png"}, "scan must be a path inside own/, is '../18.png'"),
    "picture elsewhere": ({**ROW, "scan": "/etc/hostname"}, "scan must be a path inside own/, is '/etc/hostname'"),
    "picture with a null character": ({**ROW, "scan": "18.png\0"}, "scan must be a path inside own/, is '18.png\\x00'"),
    "picture a number": ({**ROW, "scan": 18}, "scan must be a path inside own/, is 18"),
    "no object": ("row", "must be an object with keys, is 'row'"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_skipped(row: object, message: str, tmp_path: Path) -> None:
    root = write(tmp_path / "own")
    with (root / "train.jsonl").open("a") as file:
        file.write(f"\n{json.dumps(row)}\n")

    assert problems(root) == [f"train.jsonl:3: {message}"]
    assert read(root, on_bad_sample="skip").notes == ("1 bad row(s) skipped", f"train.jsonl:3: {message}")


@pytest.mark.parametrize("options", [7, ["a"], ["a", "a"], ["a", None], "a", "a||b"])
def test_options_of_a_row_are_two_or_more(options: object, tmp_path: Path) -> None:
    columns = {"text": "report", "answer": "finding", "question": "asked", "options": "o"}
    write(tmp_path, [{**ROW, "o": "benign|malignant"}, {**ROW, "o": options}], [{**TEST, "o": CHOICES}])

    (problem,) = problems(tmp_path, change(columns=columns, choices=None))
    assert problem.startswith("train.jsonl:2: o must be two or more different options (a list, or separated by |), is ")


def test_a_row_with_more_options_than_letters_is_a_bad_row(tmp_path: Path) -> None:
    """Found when it is read, and skipped where that is asked for; 62 are taken."""
    columns = {"text": "report", "answer": "finding", "question": "asked", "options": "o"}
    many = [*CHOICES, *map(str, range(61))]
    write(tmp_path, [{**ROW, "o": many[:62]}, {**ROW, "o": many}], [{**TEST, "o": CHOICES}])
    (problem,) = problems(tmp_path, change(columns=columns, choices=None))
    assert problem.startswith("train.jsonl:2: o has 63 options, at most 62 can be lettered")


def test_missing_files_and_empty_splits_are_refused(tmp_path: Path) -> None:
    assert problems(write(tmp_path, test=[])) == ["the test split is empty"]
    assert problems(tmp_path, change(train="gone.csv"), "csv") == ["gone.csv (missing)"]
    assert problems(tmp_path, change(train="x" * 5000)) == ["x" * 5000 + " (missing)"]
    with pytest.raises(DataError, match="a: cannot be read"):
        read(tmp_path, change(train="a"))
