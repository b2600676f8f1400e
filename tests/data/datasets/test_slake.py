"""SLAKE in both layouts and languages: rows that are read and refused, and the real question files where they are available."""

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
from fedmllm.data.datasets.slake import load
from fedmllm.errors import ConfigError, DataError
from fedmllm.types import Sample

Item = dict[str, Any]


def item(qid: int | str, image: int = 1, language: str = "en", **changes: object) -> Item:
    """A row with all keys of the release."""
    return {
        "img_id": image, "img_name": f"xmlab{image}/source.jpg", "question": "Where is it?", "answer": "Left", "q_lang": language,
        "location": "Lung", "modality": "CT", "answer_type": "OPEN", "base_type": "vqa", "content_type": "Position",
        "triple": ["vhead", "_", "_"], "qid": qid, **changes,
    }  # fmt: skip


UNANSWERED = item(1622, answer="", question="Does the picture contain liver?", content_type="Organ")


def write(root: Path, validate: str = "validate", **files: object) -> Path:
    """The three question files and two pictures."""
    content: dict[str, object] = {
        "train": [item(1, question="What is it?", answer="CT"), item(2, 2, "zh", question="在哪里?", answer="左"), UNANSWERED],
        "validate": [item(11)],
        "test": [item(21, 2, answer_type="CLOSED", answer="Yes"), item(22, 2, "zh")],
        **files,
    }
    for image in (1, 2):
        (root / f"imgs/xmlab{image}").mkdir(parents=True, exist_ok=True)
        (root / f"imgs/xmlab{image}/source.jpg").touch()
    for split, items in content.items():
        (root / f"{validate if split == 'validate' else split}.json").write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    return root


problems = partial(bad_rows, load)
"""The bad rows of a request."""


def ids(root: Path, **options: object) -> tuple[list[str], list[str]]:
    dataset = load(DatasetRequest(root, 0, options=options, validation_share=0))
    return [s.id for s in dataset.train], [s.id for s in dataset.test]


def test_a_row_becomes_a_sample(tmp_path: Path) -> None:
    dataset = load(DatasetRequest(write(tmp_path), 0, validation_share=0))
    image = {number: {"image": tmp_path / f"imgs/xmlab{number}/source.jpg"} for number in (1, 2)}

    assert dataset.train == (Sample("slake-train-1", "What is it?", "CT", image[1], (), "Position", "open"),)
    assert dataset.test == (Sample("slake-test-21", "Where is it?", "Yes", image[2], (), "Position", "closed"),)
    assert (dataset.name, dataset.metric, dataset.modalities) == ("slake", "accuracy", ("image",))
    assert load_dataset("slake", DatasetRequest(tmp_path, 0, validation_share=0)) == dataset


def test_the_language_can_be_chosen(tmp_path: Path) -> None:
    write(tmp_path)

    assert ids(tmp_path, language="en") == (["slake-train-1"], ["slake-test-21"])
    assert ids(tmp_path, language="zh") == (["slake-train-2"], ["slake-test-22"])
    assert ids(tmp_path, language="all") == (["slake-train-1", "slake-train-2"], ["slake-test-21", "slake-test-22"])


@pytest.mark.parametrize("name", ["validate", "validation"])
def test_the_validation_file_may_have_either_name(name: str, tmp_path: Path) -> None:
    assert ids(write(tmp_path, name), test="validate") == (["slake-train-1"], ["slake-validate-11"])


def test_without_pictures_the_question_is_the_text(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "imgs").rename(tmp_path / "elsewhere")
    dataset = load(DatasetRequest(tmp_path, 0, options={"images": False}, validation_share=0))

    assert [(s.question, s.content) for s in dataset.train] == [("Answer the question.", {"text": "What is it?"})]
    assert dataset.modalities == ("text",)
    assert problems(DatasetRequest(tmp_path, 0, validation_share=0)) == [
        "train.json (found)",
        "test.json (found)",
        "validate.json (found)",
        "imgs (missing)",
    ]


def test_the_question_without_an_answer_is_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path)

    def note(language: str) -> str:
        return next(
            n
            for n in load(DatasetRequest(tmp_path, 0, options={"language": language}, validation_share=0)).notes
            if n.startswith("train: ")
        )

    assert note("en") == "train: questions (en): 2, published: 4,919; 1 without an answer left out"
    assert note("zh") == "train: questions (zh): 1, published: 4,916"
    assert note("all") == "train: questions (all): 3, published: 9,835; 1 without an answer left out"


def test_only_that_question_may_lack_an_answer(tmp_path: Path) -> None:
    answered = {**UNANSWERED, "answer": "No"}

    assert ids(write(tmp_path, train=[item(1), answered])) == (["slake-train-1", "slake-train-1622"], ["slake-test-21"])
    assert not any("left out" in note for note in load(DatasetRequest(tmp_path, 0, validation_share=0)).notes)
    write(tmp_path, train=[item(1), {**UNANSWERED, "qid": 1623}])
    assert problems(DatasetRequest(tmp_path, 0, validation_share=0)) == ["train.json[1]: answer must be text that is not empty, got ''"]


def test_numbers_padding_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    write(tmp_path, train=[item("7", answer=3, question=" How\tmany?\n", answer_type="OPEN ")])
    (tmp_path / "train.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "train.json").read_bytes() + b"\r\n")
    (sample,) = load(DatasetRequest(tmp_path, 0, validation_share=0)).train

    assert (sample.id, sample.question, sample.answer, sample.answer_type) == ("slake-train-7", "How many?", "3", "open")


BAD = {
    "language": ({"q_lang": "fr"}, "q_lang must be one of en, zh, got 'fr'"),
    "answer type": ({"answer_type": "closed"}, "answer_type must be one of OPEN, CLOSED, got 'closed'"),
    "content type": ({"content_type": None}, "content_type must be text that is not empty, got None"),
    "question": ({"question": ["?"]}, "question must be text that is not empty, got ['?']"),
    "answer a boolean": ({"answer": False}, "answer must be text that is not empty, got False"),
    "number twice": ({"qid": "1"}, "id must be unique, but 'slake-train-1' also occurs at train.json[0]"),
    "no such picture": ({"img_name": "xmlab9/source.jpg"}, "img_name 'xmlab9/source.jpg' is not a file in imgs/"),
    "picture above": ({"img_name": "../train.json"}, "img_name must be a path inside imgs/, got '../train.json'"),
    "picture elsewhere": ({"img_name": "/etc/hostname"}, "img_name must be a path inside imgs/, got '/etc/hostname'"),
    "null character": ({"img_name": "xmlab1\0"}, "img_name must be a path inside imgs/, got 'xmlab1\\x00'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_skipped(change: Item, message: str, tmp_path: Path) -> None:
    write(tmp_path, train=[item(1), {**item(2), **change}, item(3)])

    assert problems(DatasetRequest(tmp_path, 0, validation_share=0)) == [f"train.json[1]: {message}"]
    dataset = load(DatasetRequest(tmp_path, 0, on_bad_sample="skip", validation_share=0))
    assert ([s.id for s in dataset.train], dataset.notes[:2]) == (
        ["slake-train-1", "slake-train-3"],
        ("1 bad row(s) skipped", f"train.json[1]: {message}"),
    )


def test_all_bad_rows_of_both_files_are_listed_at_once(tmp_path: Path) -> None:
    lacking = [{key: value for key, value in item(5).items() if key != gone} for gone in ("q_lang", "qid", "img_name")]
    write(tmp_path, train=["row", *lacking], test=[item(1, answer="")])

    assert [problem.split(", ")[0] for problem in problems(DatasetRequest(tmp_path, 0, validation_share=0))] == [
        "train.json[0]: must be an object with keys",
        "train.json[1]: lacks q_lang",
        "train.json[2]: lacks qid",
        "train.json[3]: lacks img_name",
        "test.json[0]: answer must be text that is not empty",
    ]


@pytest.mark.parametrize("content", [b"", b"{}", b'[{"qid": "\xff"}]', b"[{}", '[{"q_lang": "en"}]'.encode("utf-16")])
def test_a_file_that_is_not_a_json_list_is_named(content: bytes, tmp_path: Path) -> None:
    (write(tmp_path) / "test.json").write_bytes(content)

    with pytest.raises(DataError, match=r"test\.json: must be "):
        load(DatasetRequest(tmp_path, 0, validation_share=0))


def test_an_empty_split_and_unknown_options_are_refused(tmp_path: Path) -> None:
    assert problems(DatasetRequest(write(tmp_path, train=[item(1, language="zh")]), 0, validation_share=0)) == ["the train split is empty"]
    for options in ({"language": "fr"}, {"test": "validation"}, {"images": "some"}, {"lang": "en"}):
        with pytest.raises(ConfigError, match=rf"data\.options\.{next(iter(options))}: "):
            load(DatasetRequest(tmp_path, 0, options=options, validation_share=0))


@pytest.mark.data
@pytest.mark.parametrize(
    ("language", "train", "validate", "test"), [("en", 4918, 1053, 1061), ("zh", 4916, 1046, 1033), ("all", 9834, 2099, 2094)]
)
def test_the_real_files_hold_the_published_questions(language: str, train: int, validate: int, test: int, real_data: Path) -> None:
    """One English training question of the release has no answer."""
    for split, count in (("test", test), ("validate", validate)):
        options = {"images": False, "language": language, "test": split}
        dataset = load(DatasetRequest(real_data / "slake_qa" / "Slake1.0", 0, options=options, validation_share=0))
        assert (len(dataset.train), len(dataset.test)) == (train, count)
        assert all("as published" in note for note in dataset.notes)
        if (language, split) == ("en", "test"):
            assert Counter(s.answer_type for s in dataset.test) == {"open": 645, "closed": 416}
