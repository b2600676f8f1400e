"""VQA-RAD in both layouts: rows that are read and refused, and the real files where they are available."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedmllm.data.datasets import load_dataset
from fedmllm.data.datasets.base import Dataset, DatasetRequest
from fedmllm.data.datasets.vqa_rad import load
from fedmllm.data.images import open_image
from fedmllm.errors import ConfigError, DataError
from fedmllm.types import AnswerType, Sample

Row = dict[str, Any]

ORIGINAL_FILE, ORIGINAL_IMAGES = "VQA_RAD Dataset Public.json", "VQA_RAD Image Folder"
IMAGES = ("synpic100.jpg", "synpic200.jpg", "synpic300.jpg")


def short_row(qid: int | str, phrase_type: str, image: str, organ: str, question: str, answer: str | int, **changes: object) -> Row:
    """A row as the repackaged files hold it."""
    row = {"qid": qid, "image_name": image, "image_organ": organ, "answer": answer, "answer_type": "CLOSED", "question_type": "PRES"}
    return {**row, "question": question, "phrase_type": phrase_type, **changes}


def long_row(row: Row) -> Row:
    """The same row with all the keys of the original release, in its order."""
    return {
        "qid": row["qid"], "phrase_type": row["phrase_type"], "qid_linked_id": "03f451ca-de62-4617-9679-e836026a7642",
        "image_case_url": "https://medpix.nlm.nih.gov/case?id=48e1dd0e", "image_name": row["image_name"],
        "image_organ": row["image_organ"], "evaluation": "not evaluated", "question": row["question"],
        "question_rephrase": "NULL", "question_relation": "NULL", "question_frame": "NULL", "question_type": row["question_type"],
        "answer": row["answer"], "answer_type": row["answer_type"],
    }  # fmt: skip


TRAIN_ROWS = [
    short_row(1, "freeform", IMAGES[0], "HEAD", "Are regions of the brain infarcted?", "Yes"),
    short_row(2, "para", IMAGES[0], "HEAD", " Is/Are  the brain\tinfarcted? ", "yes", answer_type="CLOSED ", question_type="PRSE"),
    short_row(3, "freeform", IMAGES[1], "CHEST", "How many ribs?\n", 12, answer_type="OPEN", question_type="ATRIB"),
]
FRAME_ROW = short_row(4, "frame", IMAGES[2], "ABD", "Is/Are there gas?", "No")
TEST_ROWS = [
    short_row(11, "freeform", IMAGES[1], "CHEST", "Which organs?", "Heart \tlungs", answer_type="OPEN", question_type="ORGAN, PRES"),
    short_row(12, "para", IMAGES[2], "ABD", "Where is it?", " superficial to the\npatient's skin", answer_type="OPEN"),
]


def write_images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for i, name in enumerate(IMAGES):
        Image.new("RGB", (8, 6), (40 * i, 90, 200)).save(folder / name)


def write_repackaged(root: Path, train: object = None, test: object = None) -> Path:
    """``trainset.json``, ``testset.json`` and ``images/``."""
    write_images(root / "images")
    (root / "trainset.json").write_text(json.dumps([*TRAIN_ROWS, FRAME_ROW] if train is None else train))
    (root / "testset.json").write_text(json.dumps(TEST_ROWS if test is None else test))
    return root


def write_original(root: Path) -> Path:
    """One JSON file. The second row lacks ``question_rephrase``, as some rows of the release do."""
    write_images(root / ORIGINAL_IMAGES)
    rows = [long_row(row) for row in TRAIN_ROWS] + [long_row({**row, "phrase_type": f"test_{row['phrase_type']}"}) for row in TEST_ROWS]
    del rows[1]["question_rephrase"]
    (root / ORIGINAL_FILE).write_text(json.dumps(rows))
    return root


def expected(images: Path) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """The samples of both layouts, in the order of their ids."""

    def sample(key: str, question: str, answer: str, image: int, organ: str, answer_type: AnswerType) -> Sample:
        path = images / IMAGES[image]
        return Sample(f"vqa_rad-{key}", question, answer, {"image": path}, (), organ, answer_type)

    return (
        (
            sample("train-1", "Are regions of the brain infarcted?", "Yes", 0, "HEAD", "closed"),
            sample("train-2", "Is/Are the brain infarcted?", "yes", 0, "HEAD", "closed"),
            sample("train-3", "How many ribs?", "12", 1, "CHEST", "open"),
        ),
        (
            sample("test-11", "Which organs?", "Heart lungs", 1, "CHEST", "open"),
            sample("test-12", "Where is it?", "superficial to the patient's skin", 2, "ABD", "open"),
        ),
    )


def everything(root: Path) -> DatasetRequest:
    return DatasetRequest(root, seed=0, validation_share=0)


@pytest.mark.parametrize(("write", "images"), [(write_original, ORIGINAL_IMAGES), (write_repackaged, "images")])
def test_both_layouts_give_the_same_samples(write: Callable[[Path], Path], images: str, tmp_path: Path) -> None:
    dataset = load(everything(write(tmp_path)))

    assert (dataset.train, dataset.test) == expected(tmp_path / images)
    assert (dataset.name, dataset.metric, dataset.modalities, dataset.ceilings) == ("vqa_rad", "accuracy", ("image",), {})


def test_the_original_layout_is_preferred_over_the_repackaged_one(tmp_path: Path) -> None:
    write_repackaged(write_original(tmp_path), train=[])

    assert load(everything(tmp_path)).notes[0] == "read from the original layout"


def test_notes_say_counts_rows_left_out_and_shared_images(tmp_path: Path) -> None:
    repackaged, original = load(everything(write_repackaged(tmp_path / "a"))), load(everything(write_original(tmp_path / "b")))

    counts = "the files hold 3 train and 2 test questions, published: 1,797 train and 451 test"
    shared = "1 of the 2 test images also occur in train"
    left_out = "1 training rows of phrase_type frame were left out: the published split has none"
    assert repackaged.notes == ("read from the repackaged layout", counts, left_out, shared)
    assert original.notes == ("read from the original layout", counts, shared)


def test_published_counts_are_recognized(tmp_path: Path) -> None:
    train = [{**TRAIN_ROWS[0], "qid": i} for i in range(1797)]
    test = [{**TEST_ROWS[0], "qid": 5000 + i} for i in range(451)]

    assert (
        load(everything(write_repackaged(tmp_path, train, test))).notes[1]
        == "the files hold 1,797 train and 451 test questions, as published"
    )


def test_subsets_depend_on_the_seed_and_not_on_the_order_of_rows(tmp_path: Path) -> None:
    rows = [{**TRAIN_ROWS[0], "qid": 100 + i} for i in range(40)]
    forward, backward = write_repackaged(tmp_path / "a", rows), write_repackaged(tmp_path / "b", rows[::-1])

    def ids(root: Path, seed: int) -> list[str]:
        return [sample.id for sample in load(DatasetRequest(root, seed, num_train=10, num_test=1, validation_share=0)).train]

    assert ids(forward, 0) == ids(backward, 0)
    assert len(set(ids(forward, 0))) == 10
    assert ids(forward, 0) != ids(forward, 1)


def test_shared_images_are_counted_over_the_samples_in_use(tmp_path: Path) -> None:
    dataset = load(DatasetRequest(write_repackaged(tmp_path), seed=0, num_train=1, num_test=2, validation_share=0))

    shared = {s.content["image"] for s in dataset.train} & {s.content["image"] for s in dataset.test}
    assert dataset.notes[-1] == f"{len(shared)} of the 2 test images also occur in train"


@pytest.mark.parametrize(("split", "available"), [("train", 3), ("test", 2)])
def test_more_samples_than_there_are_is_refused(split: str, available: int, tmp_path: Path) -> None:
    write_repackaged(tmp_path)

    load(DatasetRequest(tmp_path, 0, **{f"num_{split}": available}, validation_share=0))
    with pytest.raises(DataError, match=rf"data\.num_{split}: {available + 1} samples requested, but there are {available}"):
        load(DatasetRequest(tmp_path, 0, **{f"num_{split}": available + 1}, validation_share=0))


def test_images_are_decoded_only_when_opened(tmp_path: Path) -> None:
    write_repackaged(tmp_path)
    (tmp_path / "images" / IMAGES[0]).write_bytes(b"no picture")

    broken, _, whole = load(everything(tmp_path)).train

    assert open_image(whole.content["image"]).size == (8, 6)
    with pytest.raises(DataError, match=IMAGES[0]):
        open_image(broken.content["image"])


NEARLY_WRONG = {
    "number as text": ({"qid": "7"}, {"id": "vqa_rad-train-7"}),
    "answer type padded": ({"answer_type": "\tOPEN\n"}, {"answer_type": "open"}),
    "phrase type padded": ({"phrase_type": "para "}, {"id": "vqa_rad-train-1"}),
    "zero is an answer": ({"answer": 0}, {"answer": "0"}),
    "null in words": ({"answer": "null"}, {"answer": "null"}),
    "not ASCII": ({"answer": "Größe 3 µm"}, {"answer": "Größe 3 µm"}),
    "an astral character": ({"question": "🫁?"}, {"question": "🫁?"}),
    "unknown question type": ({"question_type": ["?"]}, {"category": "HEAD"}),
    "an image in a subfolder": ({"image_name": "more/synpic..9.jpg"}, {"category": "HEAD"}),
}


@pytest.mark.parametrize(("change", "outcome"), NEARLY_WRONG.values(), ids=NEARLY_WRONG)
def test_rows_that_only_look_wrong_are_read(change: Row, outcome: Mapping[str, str], tmp_path: Path) -> None:
    write_repackaged(tmp_path, train=[{**TRAIN_ROWS[0], **change}])
    (tmp_path / "images" / "more").mkdir()
    (tmp_path / "images" / "more" / "synpic..9.jpg").touch()

    (sample,) = load(everything(tmp_path)).train

    assert {key: getattr(sample, key) for key in outcome} == outcome


def test_a_byte_order_mark_and_a_missing_question_type_are_ignored(tmp_path: Path) -> None:
    write_repackaged(tmp_path)
    rows = [{key: value for key, value in row.items() if key != "question_type"} for row in TRAIN_ROWS]
    (tmp_path / "trainset.json").write_text(json.dumps(rows), encoding="utf-8-sig")

    assert len(load(everything(tmp_path)).train) == 3


def test_rows_left_out_are_not_checked(tmp_path: Path) -> None:
    frame = {**FRAME_ROW, "image_name": "gone.jpg", "answer": "", "qid": TRAIN_ROWS[0]["qid"]}

    assert len(load(everything(write_repackaged(tmp_path, train=[*TRAIN_ROWS, frame]))).train) == 3


BROKEN = {
    "answer type of another case": ({"answer_type": "closed"}, "answer_type must be one of OPEN, CLOSED, got 'closed'"),
    "answer type misspelled": ({"answer_type": "CLOSE"}, "answer_type must be one of OPEN, CLOSED, got 'CLOSE'"),
    "answer type empty": ({"answer_type": None}, "answer_type must be one of OPEN, CLOSED, got None"),
    "phrase type unknown": ({"phrase_type": "frames"}, "phrase_type must be one of freeform, para, frame, got 'frames'"),
    "phrase type of the other layout": ({"phrase_type": "test_para"}, "phrase_type must be one of freeform, para, frame, got 'test_para'"),
    "phrase type a list": ({"phrase_type": ["para"]}, "phrase_type must be one of freeform, para, frame, got ['para']"),
    "organ misspelled": ({"image_organ": "ABDOMEN"}, "image_organ must be one of HEAD, CHEST, ABD, got 'ABDOMEN'"),
    "question of blanks": ({"question": " \t\n"}, "question must be text that is not empty"),
    "question null": ({"question": None}, "question must be text that is not empty, got None"),
    "answer empty": ({"answer": ""}, "answer must be text that is not empty, got ''"),
    "answer a boolean": ({"answer": True}, "answer must be text that is not empty, got True"),
    "answer a fraction": ({"answer": 2.5}, "answer must be text that is not empty, got 2.5"),
    "answer a list": ({"answer": ["yes"]}, "answer must be text that is not empty, got ['yes']"),
    "half a surrogate pair": ({"answer": "a\ud83e"}, "answer must be text that is not empty, got 'a\\ud83e'"),
    "qid null": ({"qid": None}, "qid must be text that is not empty, got None"),
    "qid a path": ({"qid": "../1"}, "qid must be an integer, got '../1'"),
    "qid negative": ({"qid": -1}, "qid must be an integer, got -1"),
    "qid in other digits": ({"qid": "٣"}, "qid must be an integer, got '٣'"),
    "qid twice": ({"qid": "1"}, "id must be unique, but '1' also occurs at trainset.json[0]"),
    "image missing": ({"image_name": "synpic999.jpg"}, "image_name 'synpic999.jpg' is not a file in images/"),
    "image a folder": ({"image_name": "."}, "image_name '.' is not a file in images/"),
    "image name empty": ({"image_name": ""}, "image_name must be a path inside images/, got ''"),
    "image name too long": ({"image_name": "x" * 5000}, "is not a file in images/"),
    "image name with a null": ({"image_name": "a\0b"}, "image_name must be a path inside images/, got 'a\\x00b'"),
    "image name half a pair": ({"image_name": "\ud83e.jpg"}, "is not a file in images/"),
    "image name a number": ({"image_name": 7}, "image_name must be a path inside images/, got 7"),
    "image above": ({"image_name": "../trainset.json"}, "image_name must be a path inside images/, got '../trainset.json'"),
    "image above, in disguise": ({"image_name": "../images/synpic100.jpg"}, "image_name must be a path inside images/"),
    "image elsewhere": ({"image_name": "/etc/hostname"}, "image_name must be a path inside images/, got '/etc/hostname'"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_a_bad_row_is_named_with_its_rule(change: Row, message: str, tmp_path: Path) -> None:
    write_repackaged(tmp_path, train=[*TRAIN_ROWS[:2], {**TRAIN_ROWS[2], **change}])

    with pytest.raises(DataError) as error:
        load(everything(tmp_path))
    (problem,) = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert problem.startswith("  - trainset.json[2]: ")
    assert message in problem


@pytest.mark.parametrize("key", ["qid", "phrase_type", "image_name", "image_organ", "question", "answer", "answer_type"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    write_repackaged(tmp_path, test=[TEST_ROWS[0], {k: v for k, v in TEST_ROWS[1].items() if k != key}])

    with pytest.raises(DataError, match=rf"testset\.json\[1\]: lacks {key}$"):
        load(everything(tmp_path))


def test_a_template_row_in_the_test_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"testset\.json\[0\]: phrase_type must be one of freeform, para, got 'frame'"):
        load(everything(write_repackaged(tmp_path, test=[FRAME_ROW])))


def test_a_number_used_in_both_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"testset\.json\[0\]: id must be unique, but '1' also occurs at trainset\.json\[0\]"):
        load(everything(write_repackaged(tmp_path, test=[{**TEST_ROWS[0], "qid": 1}])))


def test_invalid_numbers_are_not_reported_as_repeated(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        load(everything(write_repackaged(tmp_path, train=[{**TRAIN_ROWS[0], "qid": None}] * 2)))
    assert "qid must be text that is not empty" in str(error.value)
    assert "must occur once" not in str(error.value)


def test_all_offending_rows_of_all_files_are_listed_at_once(tmp_path: Path) -> None:
    """Each row is listed with the first rule that it breaks. The third row's picture is missing too."""
    train = [TRAIN_ROWS[0], "row", {**TRAIN_ROWS[1], "answer": "", "image_name": "gone.jpg"}, {"qid": 3}]
    test = [{**TEST_ROWS[0], "answer_type": "YES/NO"}, TEST_ROWS[1], {**TEST_ROWS[1]}]

    with pytest.raises(DataError) as error:
        load(everything(write_repackaged(tmp_path, train, test)))
    assert {line.partition(": ")[0].removeprefix("  - ") + " " + line.split()[2] for line in str(error.value).splitlines()[1:]} == {
        "trainset.json[1] must",
        "trainset.json[2] answer",
        "trainset.json[3] lacks",
        "testset.json[0] answer_type",
        "testset.json[2] id",
    }


def test_a_long_list_of_problems_is_truncated_and_counted(tmp_path: Path) -> None:
    train = [{**TRAIN_ROWS[0], "qid": 100 + i, "answer": ""} for i in range(25)]

    with pytest.raises(DataError, match=r"trainset\.json\[19\][^\n]*\n  \.\.\. and 5 more$"):
        load(everything(write_repackaged(tmp_path, train)))


NOT_ROWS = {
    "empty": (b"", "must be JSON in UTF-8"),
    "cut short": (json.dumps(TRAIN_ROWS).encode()[:-1], "must be JSON in UTF-8"),
    "Latin-1": ("[\"Größe\"]".encode("latin-1"), "must be JSON in UTF-8"),
    "UTF-16": (json.dumps(TRAIN_ROWS).encode("utf-16"), "must be JSON in UTF-8"),
    "nested too deep": (b"[" * 200_000, "must be JSON in UTF-8"),
    "a number of too many digits": (b"[" + b"1" * 5000 + b"]", "must be JSON in UTF-8"),
    "JSON lines": ("\n".join(map(json.dumps, TRAIN_ROWS)).encode(), "must be JSON in UTF-8"),
    "an object": (b'{"data": []}', "must be a list of rows, got {'data': []}"),
    "null": (b"null", "must be a list of rows, got None"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), NOT_ROWS.values(), ids=NOT_ROWS)
@pytest.mark.parametrize("file", ["trainset.json", "testset.json"])
def test_a_file_that_is_not_a_list_of_rows_is_named(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    write_repackaged(tmp_path)
    (tmp_path / file).write_bytes(content)

    with pytest.raises(DataError) as error:
        load(everything(tmp_path))
    assert f"{tmp_path / file}: {message}" in str(error.value)


def test_bad_rows_can_be_skipped(tmp_path: Path) -> None:
    """Rows left out are counted separately, bad or not. The first good row with a number keeps it."""
    train = ["row", {**TRAIN_ROWS[0], "answer": ""}, *TRAIN_ROWS, FRAME_ROW]
    write_repackaged(tmp_path, train, [*TEST_ROWS, {**TEST_ROWS[0], "qid": "1"}])

    dataset = load(DatasetRequest(tmp_path, 0, on_bad_sample="skip", validation_share=0))

    assert (dataset.train, dataset.test) == expected(tmp_path / "images")
    assert dataset.notes[1:7] == (
        "3 bad row(s) skipped",
        "trainset.json[0]: must be an object with keys, got 'row'",
        "trainset.json[1]: answer must be text that is not empty, got ''",
        "testset.json[2]: id must be unique, but '1' also occurs at trainset.json[2]",
        "the files hold 3 train and 2 test questions, published: 1,797 train and 451 test",
        "1 training rows of phrase_type frame were left out: the published split has none",
    )


@pytest.mark.parametrize("write", [write_original, write_repackaged])
def test_training_can_leave_out_the_test_images(write: Callable[[Path], Path], tmp_path: Path) -> None:
    """Training row 3 is about the image of test row 11."""
    whole = load(everything(write(tmp_path)))
    disjoint = load(DatasetRequest(tmp_path, 0, options={"image_disjoint": True}, validation_share=0))

    assert ([s.id for s in disjoint.train], disjoint.test) == (["vqa_rad-train-1", "vqa_rad-train-2"], whole.test)
    assert disjoint.notes == (
        *whole.notes[:-1],
        "image_disjoint: 1 training questions about 1 test images were left out, 2 are left",
        "0 of the 2 test images also occur in train",
    )


def test_the_disjoint_training_split_excludes_images_of_the_whole_test_split(tmp_path: Path) -> None:
    """For any drawn test questions. Only row 12 shares no image with training."""
    write_repackaged(tmp_path)
    drawn = [load(DatasetRequest(tmp_path, seed, num_test=1, options={"image_disjoint": True}, validation_share=0)) for seed in range(10)]

    assert {d.test[0].id for d in drawn} == {"vqa_rad-test-11", "vqa_rad-test-12"}
    assert {tuple(s.id for s in d.train) for d in drawn} == {("vqa_rad-train-1", "vqa_rad-train-2")}


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.options\.disjoint: "):
        load(DatasetRequest(write_repackaged(tmp_path), 0, options={"disjoint": True}, validation_share=0))


@pytest.mark.parametrize(("train", "test", "split"), [([FRAME_ROW], TEST_ROWS, "train"), (TRAIN_ROWS, [], "test")])
def test_an_empty_split_is_refused(train: Sequence[Row], test: Sequence[Row], split: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"the {split} split is empty"):
        load(everything(write_repackaged(tmp_path, train, test)))


@pytest.mark.parametrize("missing", ["trainset.json", "testset.json", "images"])
def test_an_incomplete_layout_names_the_expected_files(missing: str, tmp_path: Path) -> None:
    write_repackaged(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")

    with pytest.raises(DataError) as error:
        load(everything(tmp_path))
    names = ("trainset.json", "testset.json", "images/")
    found = ", ".join(f"{name} ({'missing' if name.rstrip('/') == missing else 'found'})" for name in names)
    assert f"repackaged: {found}" in str(error.value)
    assert f"original: {ORIGINAL_FILE} (missing), {ORIGINAL_IMAGES}/ (missing)" in str(error.value)


def test_loading_without_a_folder_is_refused(tmp_path: Path) -> None:
    write_repackaged(tmp_path)

    assert load_dataset("vqa_rad", everything(tmp_path)) == load(everything(tmp_path))
    for ask in (load, lambda request: load_dataset("vqa_rad", request)):
        with pytest.raises(ConfigError, match=r"data\.root"):
            ask(DatasetRequest(None, seed=0, validation_share=0))


# Fuzzing: any content of the files is either read by the rules or refused with a DataError.


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose files each example overwrites."""
    return write_repackaged(tmp_path_factory.mktemp("fuzz") / "vqa_rad")


def read_or_refused(root: Path, train: bytes) -> Dataset | None:
    (root / "trainset.json").write_bytes(train)
    try:
        dataset = load(everything(root))
    except DataError:
        return None
    for sample in dataset.train:
        assert sample.question == " ".join(sample.question.encode().decode().split()) != ""
        assert sample.answer == " ".join(sample.answer.encode().decode().split()) != ""
        assert sample.category in {"HEAD", "CHEST", "ABD"}
        assert sample.answer_type in {"open", "closed"}
        image = sample.content["image"]
        assert isinstance(image, Path)
        assert image.resolve().is_relative_to(root.resolve())
        assert image.is_file()
    return dataset


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*TRAIN_ROWS[0], "x"]), inner, max_size=8),
    max_leaves=15,
)
PLAUSIBLE = st.sampled_from(["OPEN", "CLOSED ", "open", "para", "frame", "HEAD", "", " ", "1", 1, "../a", "/", ".", "images", *IMAGES])


@given(content=st.binary(max_size=200))
@settings(max_examples=60)
def test_any_bytes_are_refused(content: bytes, scratch: Path) -> None:
    assert read_or_refused(scratch, content) is None


@given(value=JSON_VALUES)
@settings(max_examples=80)
def test_any_json_is_refused(value: object, scratch: Path) -> None:
    assert read_or_refused(scratch, json.dumps(value).encode()) is None


@given(data=st.data())
@settings(max_examples=200)
def test_rows_with_any_values_are_read_by_the_rules_or_refused(data: st.DataObject, scratch: Path) -> None:
    rows = [dict(row) for row in (*TRAIN_ROWS, FRAME_ROW)]
    for _ in range(data.draw(st.integers(1, 4))):
        row, key = data.draw(st.sampled_from(rows)), data.draw(st.sampled_from([*TRAIN_ROWS[0]]))
        if data.draw(st.booleans()):
            row[key] = data.draw(PLAUSIBLE | JSON_VALUES)
        else:
            row.pop(key, None)
    dataset = read_or_refused(scratch, json.dumps(rows).encode())
    if dataset is not None:
        assert 0 < len(dataset.train) <= len(rows)


@given(cut=st.integers(0, 10_000), junk=st.binary(min_size=1, max_size=4))
@settings(max_examples=80)
def test_a_damaged_file_is_read_by_the_rules_or_refused(cut: int, junk: bytes, scratch: Path) -> None:
    whole = json.dumps(TRAIN_ROWS).encode()
    at = cut % len(whole)
    read_or_refused(scratch, whole[:at] + junk + whole[at + len(junk) :])


# The real files.


@pytest.fixture(scope="module")
def real_root() -> Path:
    folder = os.environ.get("FEDMLLM_DATA")
    if not folder:
        pytest.skip("FEDMLLM_DATA is not set: name the folder that holds vqa_rad/ to test on the real files")
    root = Path(folder) / "vqa_rad"
    if not root.is_dir():
        pytest.skip(f"{root} is no folder: put the files of VQA-RAD there to test on them")
    return root


@pytest.mark.data
def test_the_real_files_hold_the_published_split(real_root: Path) -> None:
    dataset = load(everything(real_root))

    assert (len(dataset.train), len(dataset.test)) == (1797, 451)
    assert Counter(s.category for s in dataset.test) == {"CHEST": 174, "ABD": 158, "HEAD": 119}
    assert Counter(s.answer_type for s in dataset.test) == {"closed": 272, "open": 179}
    assert Counter(s.answer_type for s in dataset.train) == {"closed": 1027, "open": 770}
    assert "the files hold 1,797 train and 451 test questions, as published" in dataset.notes
    # All 203 test images occur in the repackaged training file, one of them (synpic23571.jpg) in rows that are left out only.
    assert "202 of the 203 test images also occur in train" in dataset.notes
    disjoint = load(DatasetRequest(real_root, 0, options={"image_disjoint": True}, validation_share=0))
    assert (len(disjoint.train), disjoint.test) == (734, dataset.test)
    assert "image_disjoint: 1,063 training questions about 202 test images were left out, 734 are left" in disjoint.notes
    for sample in (*dataset.train[:3], *dataset.test[:3]):
        assert open_image(sample.content["image"]).mode == "RGB"


@pytest.mark.data
def test_the_real_rows_are_the_same_in_the_other_layout(real_root: Path, tmp_path: Path) -> None:
    if not (real_root / "testset.json").is_file():
        pytest.skip(f"{real_root} is in the original layout already")
    train, test = (json.loads((real_root / f"{split}set.json").read_text(encoding="utf-8")) for split in ("train", "test"))
    rows = [row for row in train if row["phrase_type"] != "frame"] + [{**row, "phrase_type": f"test_{row['phrase_type']}"} for row in test]
    (tmp_path / ORIGINAL_FILE).write_text(json.dumps([long_row(row) for row in rows]))
    (tmp_path / ORIGINAL_IMAGES).symlink_to((real_root / "images").resolve(), target_is_directory=True)

    def described(dataset: Dataset) -> list[tuple[object, ...]]:
        samples = (*dataset.train, *dataset.test)
        return [(s.id, s.question, s.answer, s.category, s.answer_type, Path(str(s.content["image"])).name) for s in samples]

    original, repackaged = load(everything(tmp_path)), load(everything(real_root))
    assert described(original) == described(repackaged)
    (left_out,) = set(repackaged.notes[1:]) - set(original.notes[1:])
    assert left_out == "1,267 training rows of phrase_type frame were left out: the published split has none"
