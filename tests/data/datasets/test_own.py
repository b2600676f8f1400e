"""The user's own files: the meaning of columns, held-out rows, contradictory settings and refused rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bad_rows import bad_rows
from fedmllm.data.datasets import DATASETS, load_dataset
from fedmllm.data.datasets.base import Dataset, DatasetEntry, DatasetRequest
from fedmllm.data.datasets.tables import SEPARATORS
from fedmllm.data.fingerprint import folder_key
from fedmllm.data.settings import DataConfig
from fedmllm.errors import ConfigError, DataError
from fedmllm.types import Sample

Record = dict[str, Any]

COLUMNS = {"image": "scan", "text": "report", "question": "asked", "answer": "finding", "client": "site"}
CHOICES = ["benign", "malignant"]
OPTIONS: Mapping[str, Any] = {"train": "train.jsonl", "test": "test.jsonl", "columns": COLUMNS, "choices": CHOICES}
ROW = {"scan": "a/17.png", "report": 'Two\n"dense" areas, left.', "asked": "Is it suspicious?", "finding": "benign", "site": "north"}
TEST = {**ROW, "scan": "18.png", "finding": "malignant", "site": "south"}


def write(root: Path, train: list[Any] | None = None, test: list[Any] | None = None) -> Path:
    """The same rows as JSON lines, CSV and TSV, with two pictures and a recording."""
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
    return load_dataset(name, DatasetRequest(root, 0, options=options, **request, validation_share=0))


def problems(root: Path, options: Mapping[str, Any] = OPTIONS, name: str = "jsonl") -> list[str]:
    return bad_rows(read, root, options, name)


@pytest.mark.parametrize(("name", "suffix", "line"), [("jsonl", ".jsonl", 1), ("csv", ".csv", 3), ("csv", ".tsv", 3)])
def test_a_row_becomes_a_sample(name: str, suffix: str, line: int, tmp_path: Path) -> None:
    """In tables a header comes first, and the row takes two lines."""
    quoted = {"quoted": True} if suffix == ".tsv" else {}
    dataset = read(write(tmp_path), {**OPTIONS, "train": f"train{suffix}", "test": f"test{suffix}", **quoted}, name)

    def sample(key: str, image: str, answer: str, client: str) -> Sample:
        content = {"image": tmp_path / image, "text": 'Two "dense" areas, left.'}
        return Sample(f"{key}-{line}", "Is it suspicious?", answer, content, ("benign", "malignant"), answer, client=client)

    assert dataset.train == (sample("train", "a/17.png", "benign", "north"),)
    assert dataset.test == (sample("test", "18.png", "malignant", "south"),)
    assert (dataset.name, dataset.metric, dataset.modalities) == (name, "auc", ("image", "text"))
    assert [note for note in dataset.notes if "cell(s)" not in note] == (
        [] if name == "jsonl" else [f"{split}{suffix}:3: report spans 2 lines" for split in ("train", "test")]
    )


@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_options_can_differ_by_row(name: str, tmp_path: Path) -> None:
    """An empty list means that the row's answer is free."""
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

    def described(leave_out: str) -> list[tuple[str, ...]]:
        chosen = {key: column for key, column in columns.items() if key != leave_out}
        dataset = read(tmp_path, {**OPTIONS, "columns": chosen, "question": "?", "choices": []})
        return [(s.answer, s.category, s.answer_type, s.domain) for s in dataset.train]

    assert described("") == [("12", "size", "open", "A"), ("YES", "size", "open", "A"), ("a b", "size", "closed", "A")]
    assert described("answer_type") == [("12", "size", "open", "A"), ("YES", "size", "closed", "A"), ("a b", "size", "open", "A")]
    assert described("category")[0] == ("12", "all", "open", "A")


@pytest.mark.parametrize("nothing", [None, "", " \n", "absent"])
def test_an_empty_field_means_a_missing_modality(nothing: str | None, tmp_path: Path) -> None:
    def without(*keys: str) -> Record:
        row = {**ROW, **dict.fromkeys(keys, nothing)}
        return {key: value for key, value in row.items() if value != "absent"}

    dataset = read(write(tmp_path, [ROW, without("scan"), without("report")]))
    assert [s.modalities for s in dataset.train] == [("image", "text"), ("text",), ("image",)]

    write(tmp_path, [ROW, without("scan", "report")])
    assert problems(tmp_path) == ["train.jsonl:2: all of scan, report are empty; at least one is required"]
    assert [s.modalities for s in read(tmp_path, {**OPTIONS, "keep_empty": True}).train] == [("image", "text"), ()]


def test_a_modality_of_another_name_is_a_file(tmp_path: Path) -> None:
    write(tmp_path, [{**ROW, "sound": "19.wav"}, {**ROW, "sound": None}, {**ROW, "sound": "20.wav"}])
    options = {**OPTIONS, "columns": {**COLUMNS, "audio": "sound"}}

    assert problems(tmp_path, options) == [f"train.jsonl:3: sound '20.wav' is not a file in {tmp_path.name}/"]
    dataset = read(tmp_path, options, on_bad_sample="skip")
    assert [s.content.get("audio") for s in dataset.train] == [tmp_path / "19.wav", None]
    assert (dataset.modalities, dataset.notes[0]) == (("audio", "image", "text"), "1 bad row(s) skipped")


def test_a_share_is_held_out_without_a_test_file(tmp_path: Path) -> None:
    write(tmp_path, [ROW] * 20)
    dataset = read(tmp_path, {**OPTIONS, "test": None})
    train, test = ({int(s.id.removeprefix("train-")) for s in split} for split in (dataset.train, dataset.test))

    assert (len(train), len(test), train | test) == (16, 4, set(range(1, 21)))
    assert len(read(tmp_path, {**OPTIONS, "test": None, "test_share": 0.5}).test) == 10
    assert load_dataset("jsonl", DatasetRequest(tmp_path, 1, options={**OPTIONS, "test": None}, validation_share=0)).test != dataset.test


def test_ids_of_a_column_are_unique_across_both_files(tmp_path: Path) -> None:
    options = {**OPTIONS, "columns": {**COLUMNS, "id": "n"}}

    assert [s.id for s in read(write(tmp_path, [{**ROW, "n": "u"}, {**ROW, "n": 7}], [{**TEST, "n": "v"}]), options).train] == ["7", "u"]
    write(tmp_path, [{**ROW, "n": "u"}, {**ROW, "n": 7}], [{**TEST, "n": "7"}])
    assert problems(tmp_path, options) == ["test.jsonl:1: id must be unique, but '7' also occurs at train.jsonl:2"]


def options_with(**changes: object) -> dict[str, Any]:
    """The options with some changed; None removes one."""
    return {key: value for key, value in {**OPTIONS, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("options", "metric"),
    [
        (options_with(), "auc"),
        (options_with(choices=["benign", "malignant", "none"]), "macro_f1"),
        (options_with(choices=None), "accuracy"),
        (options_with(metric="macro_f1"), "macro_f1"),
        (options_with(metric="accuracy"), "accuracy"),
    ],
)
def test_the_headline_follows_from_the_choices(options: dict[str, Any], metric: str, tmp_path: Path) -> None:
    assert read(write(tmp_path), options).metric == metric


CONTRADICTIONS = {
    "no columns": (options_with(columns=None), "columns: is required"),
    "no answer": (options_with(columns={"text": "report", "question": "asked"}), "columns: answer is required"),
    "no modality": (options_with(columns={"answer": "finding", "question": "asked"}), "columns: name at least one modality"),
    "two questions": (options_with(question="?"), "question: set either question or columns.question"),
    "no question": (options_with(columns={"text": "report", "answer": "finding"}), "question: set either question or columns.question"),
    "two kinds of options": (options_with(columns={**COLUMNS, "options": "o"}), "choices: set either choices or columns.options"),
    "one choice": (options_with(choices=["benign"]), "choices: must be two or more different texts, got ['benign']"),
    "choices repeated": (options_with(choices=["a", "b", "a"]), "choices: must be two or more different texts"),
    "a choice no answer can be": (options_with(choices=["a", "b "]), "choices: 'b ' must have words and single spaces"),
    "an empty choice": (options_with(choices=["a", ""]), "choices: '' must have words and single spaces"),
    "YAML's yes and no": (options_with(choices=[True, False]), "choices.0: must be text, got true; quote it"),
    "more choices than letters": (
        options_with(choices=[str(i) for i in range(63)]),
        "choices: there are 63, but at most 62 can be lettered",
    ),
    "auc of three": (options_with(metric="auc", choices=["a", "b", "c"]), "metric: auc needs exactly two choices"),
    "auc of free answers": (options_with(metric="auc", choices=None), "metric: auc needs exactly two choices"),
    "macro_f1 of free answers": (options_with(metric="macro_f1", choices=None), "metric: macro_f1 needs choices"),
    "an unknown metric": (options_with(metric="f1"), "metric: 'f1' is not a known headline score; known: auc, macro_f1"),
    "tested on what is trained on": (options_with(test="train.jsonl"), "test: must differ from train"),
    "a file above": (options_with(train="../train.jsonl"), "train: must be a path inside root or an absolute path, got '../train.jsonl'"),
    "no share": (options_with(test=None, test_share=1), "test_share: must be less than 1.0, got 1"),
    "unknown": (options_with(labels=["a"]), "labels: is not a known setting; known: train, test,"),
}


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
@pytest.mark.parametrize("name", ["jsonl", "csv"])
def test_contradictory_settings_are_refused(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(write(tmp_path), options, name)
    assert message in str(error.value)


@pytest.mark.parametrize(("role", "name"), [("answer", "jsonl"), ("image", "jsonl"), ("client", "csv"), ("text", "csv")])
def test_a_missing_column_is_named_with_the_existing_ones(role: str, name: str, tmp_path: Path) -> None:
    options = options_with(columns={**COLUMNS, role: "misspelled"}, train=f"train.{name}", test=f"test.{name}")
    fields = r"data\.options\.columns: the fields are asked, finding, report, scan, site\n"

    with pytest.raises(ConfigError, match=rf"{fields}  - {role}: no row has a field misspelled$"):
        read(write(tmp_path), options, name)


BAD: dict[str, tuple[object, str]] = {
    "answer of another case": ({**ROW, "finding": "Benign"}, "finding must be one of benign, malignant, got 'Benign'"),
    "answer missing": ({key: value for key, value in ROW.items() if key != "finding"}, "lacks finding"),
    "question empty": ({**ROW, "asked": ""}, "asked must be text that is not empty, got ''"),
    "text a list": ({**ROW, "report": ["x"]}, "report must be text that is not empty, got ['x']"),
    "picture above": ({**ROW, "scan": "../18.png"}, "scan must be a path inside own/, got '../18.png'"),
    "picture elsewhere": ({**ROW, "scan": "/etc/hostname"}, "scan must be a path inside own/, got '/etc/hostname'"),
    "picture with a null character": ({**ROW, "scan": "18.png\0"}, "scan must be a path inside own/, got '18.png\\x00'"),
    "picture a number": ({**ROW, "scan": 18}, "scan must be a path inside own/, got 18"),
    "no object": ("row", "must be an object with keys, got 'row'"),
}


@pytest.mark.parametrize(("row", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_skipped(row: object, message: str, tmp_path: Path) -> None:
    root = write(tmp_path / "own")
    with (root / "train.jsonl").open("a") as file:
        file.write(f"\n{json.dumps(row)}\n")

    assert problems(root) == [f"train.jsonl:3: {message}"]
    assert read(root, on_bad_sample="skip").notes == ("1 bad row(s) skipped", f"train.jsonl:3: {message}")


@pytest.mark.parametrize("options", [7, ["a"], ["a", "a"], ["a", None], "a", "a||b"])
def test_a_row_needs_two_options_or_more(options: object, tmp_path: Path) -> None:
    columns = {"text": "report", "answer": "finding", "question": "asked", "options": "o"}
    write(tmp_path, [{**ROW, "o": "benign|malignant"}, {**ROW, "o": options}], [{**TEST, "o": CHOICES}])

    (problem,) = problems(tmp_path, options_with(columns=columns, choices=None))
    assert problem.startswith("train.jsonl:2: o must be two or more different options (a list, or separated by |), got ")


def test_a_row_with_more_options_than_letters_is_a_bad_row(tmp_path: Path) -> None:
    """It is found when it is read, and skipped if the setting says so. 62 options are accepted."""
    columns = {"text": "report", "answer": "finding", "question": "asked", "options": "o"}
    many = [*CHOICES, *map(str, range(61))]
    write(tmp_path, [{**ROW, "o": many[:62]}, {**ROW, "o": many}], [{**TEST, "o": CHOICES}])
    (problem,) = problems(tmp_path, options_with(columns=columns, choices=None))
    assert problem.startswith("train.jsonl:2: o has 63 options, but at most 62 can be lettered")


def test_missing_files_and_empty_splits_are_refused(tmp_path: Path) -> None:
    assert problems(write(tmp_path, test=[])) == ["the test split is empty"]
    assert problems(tmp_path, options_with(train="gone.csv"), "csv") == ["gone.csv (missing)"]
    assert problems(tmp_path, options_with(train="x" * 5000)) == ["x" * 5000 + " (missing)"]
    with pytest.raises(DataError, match="a: cannot be read"):
        read(tmp_path, options_with(train="a"))


TABLE = {"train": "t.csv", "test_share": 0.5, "columns": {"text": "text", "answer": "label"}, "question": "?", "choices": ["cat", "dog"]}


def texts(root: Path, content: str, file: str = "t.csv", **options: Any) -> tuple[list[str], tuple[str, ...]]:
    """The texts of all rows of a table in order, and the notes."""
    (root / file).write_text(content, encoding="utf-8")
    found = read(root, {**TABLE, "train": file, **options}, "csv")
    by_line = sorted((*found.train, *found.test), key=lambda s: int(s.id.rpartition("-")[2]))
    return [str(s.content["text"]) for s in by_line], tuple(note for note in found.notes if "held out" not in note)


def test_quotation_marks_in_a_tsv_swallow_no_rows(tmp_path: Path) -> None:
    """Row 3 begins with a quotation mark, row 7 ends with one."""
    cells = [f"row {i}" for i in range(1, 13)]
    cells[2], cells[6] = '"row 3', 'row 7"'
    content = "text\tlabel\n" + "".join(f"{cell}\t{'cat' if i % 2 else 'dog'}\n" for i, cell in enumerate(cells))
    assert texts(tmp_path, content, "t.tsv") == (cells, ())
    described = texts(tmp_path, 'text\tlabel\n"a b"\tcat\nc\tdog\n', "t.tsv")
    assert described == (
        ['"a b"', "c"],
        ("1 cell(s) are enclosed in quotation marks; to remove these, set data.options.quoted=true", "t.tsv:2: text"),
    )
    assert texts(tmp_path, 'text\tlabel\n"a b"\tcat\nc\tdog\n', "t.tsv", quoted=True) == (["a b", "c"], ())


def test_a_cell_that_spans_lines_is_noted(tmp_path: Path) -> None:
    found, notes = texts(tmp_path, 'text,label\n"a,dog\nb,cat\nc",dog\nd,cat\n')
    assert found == ["a,dog b,cat c", "d"]
    remedy = "if a stray quotation mark caused this, set data.options.quoted=false"
    assert notes == (f"1 cell(s) span several lines; {remedy}", "t.csv:4: text spans 3 lines")


@pytest.mark.parametrize(("name", "separator"), SEPARATORS.items())
@pytest.mark.parametrize("named", [False, True])
def test_the_separator_is_recognized(name: str, separator: str, named: bool, tmp_path: Path) -> None:
    """Also if another separator occurs more often in the header, and if a ``sep=`` line names it, as spreadsheets write."""
    rows = ["text", 'a; "b", c | d'.replace(separator, ""), "e"], ["label", "cat", "dog"], ["x,y;z|u".replace(separator, "."), "1", "2"]
    lines = [separator.join(cells) for cells in zip(*rows, strict=True)]
    quoted = {"quoted": False}
    found, _ = texts(tmp_path, f"{f'sep={separator}' * named}\n" + "\n".join(lines) + "\n", **quoted)
    assert found == [" ".join(rows[0][1].split()), "e"]
    assert texts(tmp_path, "\n".join(lines) + "\n", **quoted, delimiter=name)[0] == found


def test_windows_paths_and_both_unicode_forms_of_accents_are_found(tmp_path: Path) -> None:
    """The table and the disk may use different Unicode forms. This also holds for choices, columns and answers."""
    one, two = "caf\u00e9", "cafe\u0301"
    (tmp_path / "img").mkdir()
    for name in (f"{two}.png", f"{one}2.png"):
        (tmp_path / "img" / name).touch()
    (tmp_path / "t.csv").write_text(f"{two},label\nimg\\{one}.png,{two}\nimg/{two}2.png,{one}\nimg\\{one}2.png,th\u00e9\n")
    options = {**TABLE, "columns": {"image": one, "answer": "label"}, "choices": [two, "the\u0301"]}
    found = read(tmp_path, options, "csv")
    samples = sorted((*found.train, *found.test), key=lambda s: s.id)
    assert [(s.answer, Path(str(s.content["image"])).name) for s in samples] == [
        (one, f"{two}.png"),
        (one, f"{one}2.png"),
        ("th\u00e9", f"{one}2.png"),
    ]


@pytest.mark.parametrize("name", ["..\\18.png", "\\etc\\hostname", "a\\..\\..\\18.png"])
def test_paths_with_backslashes_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    write(tmp_path / "own", [{**ROW, "scan": name}, ROW])
    (problem,) = problems(tmp_path / "own")
    assert "scan must be a path inside own/" in problem


def test_numbers_and_truth_values_of_json_are_labels(tmp_path: Path) -> None:
    for values, choices in (([1.0, 0, "1"], ["0", "1"]), ([1, 0.0, "0"], [0, 1]), ([True, False, "true"], ["false", "true"])):
        (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "x", "label": value}) + "\n" for value in values))
        found = read(tmp_path, {**TABLE, "train": "t.jsonl", "choices": choices})
        labels = [s.answer for s in sorted((*found.train, *found.test), key=lambda s: s.id)]
        assert labels == [str(int(v) if isinstance(v, float) else v).lower() for v in values]


@pytest.mark.parametrize("setting", ["choices", "question", "columns"])
def test_words_that_yaml_reads_as_booleans_must_be_quoted(setting: str, tmp_path: Path) -> None:
    value: Any = {"choices": [False, True], "question": True, "columns": {"text": "text", "answer": True}}[setting]
    with pytest.raises(
        ConfigError, match=r"must be text, got (true|false); quote it, because YAML reads yes, no, on, off, true and false as"
    ):
        read(tmp_path, {**TABLE, setting: value}, "csv")


def test_choices_that_match_no_row_are_one_error(tmp_path: Path) -> None:
    """There is one error, not one for each row."""
    with pytest.raises(ConfigError) as error:
        texts(tmp_path, "text,label\n" + "a,Cat\nb,Dog\nc,Dog\n")
    message = (
        "no row's label is one of cat, dog; correct choices or columns.answer. The rows have:\n  - 'Dog': 2 row(s)\n  - 'Cat': 1 row(s)"
    )
    assert message in str(error.value)


def test_a_json_list_in_a_jsonl_file_is_read(tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": "cat" if i % 2 else "dog"} for i in range(6)]
    (tmp_path / "t.jsonl").write_text("\n" + json.dumps(rows, indent=1))
    found = read(tmp_path, {**TABLE, "train": "t.jsonl"})
    assert len(found.train) + len(found.test) == 6
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[0], indent=1))
    with pytest.raises(
        DataError, match="must contain one JSON object per line, or one list of objects; found a single object over several lines"
    ):
        read(tmp_path, {**TABLE, "train": "t.jsonl"})


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("https://example.org/1.png", "a web address"),
        ("data:image/png;base64,AAAA", "an image in base64"),
        ("A" * 5000, "an image in base64"),
    ],
)
def test_pictures_that_are_not_files_are_one_error(value: str, kind: str, tmp_path: Path) -> None:
    write(tmp_path, [{**ROW, "scan": value}] * 3 + [ROW])
    with pytest.raises(ConfigError, match=rf"scan must name files inside root, got {kind} in 3 row\(s\); save the images as files"):
        read(tmp_path)


def test_properties_that_affect_scenarios_and_partitions_are_noted(tmp_path: Path) -> None:
    """The notes name held-out rows, rows that lack a modality, and a category that all samples share."""
    rows = [{**ROW, "finding": str(i)} | ({"scan": ""} if i < 3 else {}) for i in range(10)]
    free = options_with(columns={key: name for key, name in COLUMNS.items() if key != "client"}, choices=None, test=None)
    assert read(write(tmp_path, rows), free).notes == (
        "2 of 10 rows are held out as the test split (data.options.test_share)",
        "3 of 10 rows hold only text",
        "columns.category names no column: all samples have the same category, so a Dirichlet partition only skews sizes",
    )


def test_the_remedy_for_own_files_is_not_to_download_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 bad row\(s\); correct them, or set data.on_bad_sample to skip"):
        read(write(tmp_path, [ROW, {**ROW, "finding": "x"}]))


def test_an_own_dataset_registered_without_a_folder_gets_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "mine", DatasetEntry("mine", lambda request: pytest.fail("it is not loaded")))
    with pytest.raises(
        ConfigError, match=r"data\.root: mine reads no folder according to its DatasetEntry; .* register it with needs_root=True"
    ):
        load_dataset("mine", DatasetRequest(tmp_path, 0))


def test_rows_may_be_outside_of_root_but_their_files_must_be_inside(tmp_path: Path) -> None:
    write(tmp_path / "pictures")
    (tmp_path / "lists").mkdir()
    rows = (tmp_path / "pictures" / "train.jsonl").rename(tmp_path / "lists" / "train.jsonl")
    options = options_with(train=str(rows))
    assert len(load_dataset("jsonl", DatasetRequest(tmp_path / "pictures", 0, options=options)).train) == 1

    rows.write_text(json.dumps({**ROW, "scan": str(tmp_path / "pictures" / "18.png")}) + "\n")
    with pytest.raises(DataError, match="must be a path inside pictures/"):
        load_dataset("jsonl", DatasetRequest(tmp_path / "pictures", 0, options=options))


def test_settings_for_another_machine_have_no_paths(tmp_path: Path) -> None:
    own = {"dataset": "jsonl", "root": str(tmp_path), "options": options_with(train=str(tmp_path / "lists" / "train.jsonl"))}
    described = DataConfig.model_validate(own).without_paths()
    assert (described.root, described.options["train"], described.options["test"]) == (None, "train.jsonl", "test.jsonl")
    mixed = DataConfig.model_validate({"dataset": "mixture", "options": {"parts": [own, {"dataset": "digits-vqa"}]}}).without_paths()
    assert str(tmp_path) not in mixed.model_dump_json()


def test_a_changed_file_outside_of_root_changes_the_key(tmp_path: Path) -> None:
    write(tmp_path / "pictures")
    rows = (tmp_path / "pictures" / "train.jsonl").rename(tmp_path / "train.jsonl")
    settings = {"dataset": "jsonl", "root": str(tmp_path / "pictures"), "options": options_with(train=str(rows))}
    config = DataConfig.model_validate(settings)
    before = folder_key(*config.sources)
    assert folder_key(*config.sources) == before
    rows.write_text(rows.read_text() + json.dumps(ROW) + "\n")
    assert folder_key(*config.sources) != before
