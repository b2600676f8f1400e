"""Fuzzing: any content of a dataset's files is either read by the rules or refused with an error that says why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.data.datasets import DATASETS, load_dataset
from fedmllm.data.datasets.base import Dataset, DatasetRequest
from fedmllm.data.datasets.rows import OnBadSample
from fedmllm.errors import ConfigError, DataError

POLICIES: tuple[OnBadSample, ...] = ("refuse", "skip")


@dataclass(frozen=True)
class Folder:
    """A complete folder of a dataset.

    Attributes:
        files: contents of the files with rows, by name.
        pictures: empty files beside them.
        options: the dataset's settings.
    """

    files: Mapping[str, bytes]
    pictures: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def meme(number: int, label: int) -> dict[str, object]:
    return {"id": number, "img": f"img/{number}.png", "label": label, "text": "words 🌀"}


def tweet(number: int, label: str) -> bytes:
    image = f"data_image/maria/{number}.jpg"
    return (
        "\t".join(["maria", "1", f"{number}_0", f'"wind" {number} http://t.co/1', image, label, label, label, "Positive"]).encode() + b"\n"
    )


def question(qid: int, **more: object) -> dict[str, object]:
    return {"qid": qid, "question": "Where?", "answer": qid, "answer_type": "OPEN", **more}


def slake(qid: int) -> dict[str, object]:
    return question(qid, q_lang="en", img_name="x/source.jpg", content_type="Organ")


def rad(qid: int, phrase_type: str) -> dict[str, object]:
    return question(qid, phrase_type=phrase_type, image_name="1.jpg", image_organ="HEAD")


TWEETS = b"event_name\ttweet_id\timage_id\ttweet_text\timage\tlabel\tlabel_text\tlabel_image\tlabel_text_image\n"
TSV = "crisismmd_datasplit_all/task_humanitarian_text_img_{}.tsv"
CARDS = [{"instruction": "Answer", "input": f"What is {i}?", "output": f"It is {i}."} for i in range(8)]
EMOJI = {f"1f60{i}": {"name": "face", "category": category, "keywords": ["x"]} for i, category in enumerate(["people", "food", "people"])}
OWN: dict[str, Any] = {
    "columns": {"image": "scan", "text": "t", "answer": "a", "options": "o", "id": "n"},
    "question": "Which?",
    "test_share": 0.5,
}
FOLDERS = {
    "hateful_memes": Folder(
        {"train.jsonl": lines(meme(1, 0), meme(2, 1)), "dev.jsonl": lines(meme(3, 0))}, ("img/1.png", "img/2.png", "img/3.png")
    ),
    "crisismmd": Folder(
        {
            TSV.format("train"): TWEETS + tweet(1, "vehicle_damage") + tweet(2, "not_humanitarian"),
            TSV.format("test"): TWEETS + tweet(3, "vehicle_damage"),
        },
        tuple(f"data_image/maria/{i}.jpg" for i in (1, 2, 3)),
    ),
    "vqa_rad": Folder({"trainset.json": lines([rad(1, "para"), rad(2, "frame")]), "testset.json": lines([rad(3, "para")])}, ("images/1.jpg",)),
    "slake": Folder({"train.json": lines([slake(1), slake(2)]), "test.json": lines([slake(3)])}, ("imgs/x/source.jpg",)),
    "medical_flashcards": Folder({"medical_meadow_wikidoc_medical_flashcards.json": lines(CARDS)}),
    "nlvr": Folder(
        {f"{s}/{s}.json": lines(*({"sentence": "x", "label": "true", "identifier": f"{i}-0", "directory": "2"} for i in (1, 2))) for s in ("dev", "test")},
        tuple(f"{s}/images/2/{s}-{i}-0-0.png" for s in ("dev", "test") for i in (1, 2)),
    ),
    "emojitwo": Folder({"emoji.json": lines(EMOJI)}, tuple(f"png/128/{code}.png" for code in EMOJI), {"test_share": 0.5}),
    "jsonl": Folder(
        {"train.jsonl": lines(*({"scan": "1.png", "t": "x", "a": "u", "o": ["u", "v"], "n": i} for i in range(4)))},
        ("1.png",),
        {**OWN, "train": "train.jsonl"},
    ),
    "csv": Folder(
        {"train.csv": b'scan,t,a,o,n\n1.png,"x ""y""\nz",u,u|v,1\n,x,v,u|v,2\n1.png,,u,u|v,3\n'}, ("1.png",), {**OWN, "train": "train.csv"}
    ),
}  # fmt: skip


def test_every_dataset_of_rows_in_files_has_a_folder() -> None:
    """Except datasets that other libraries or loaders read."""
    assert set(FOLDERS) == {name for name, entry in DATASETS.items() if entry.needs_root} - {"huggingface"}


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A dataset and its complete folder. Each example damages one file and restores it."""
    root = tmp_path_factory.mktemp(request.param)
    for name, content in {**FOLDERS[request.param].files, **dict.fromkeys(FOLDERS[request.param].pictures, b"")}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return request.param, root


def read_or_refused(name: str, root: Path, policy: OnBadSample) -> Dataset | None:
    try:
        dataset = load_dataset(name, DatasetRequest(root, 0, on_bad_sample=policy, options=FOLDERS[name].options, validation_share=0))
    except (DataError, ConfigError):
        return None
    for sample in (*dataset.train, *dataset.test):
        assert all(text == " ".join(text.encode().decode().split()) != "" for text in (sample.id, sample.question, sample.answer))
        assert not sample.options or sample.answer in sample.options
        assert sample.content
        for modality, value in sample.content.items():
            if modality == "text":
                assert value
            else:
                assert isinstance(value, Path)
                assert value.is_file()
                assert value.resolve().is_relative_to(root.resolve())
    return dataset


def check_both_policies(name: str, root: Path, file: str, content: bytes) -> None:
    """Both policies agree on which rows are good."""
    (root / file).write_bytes(content)
    try:
        refusing, skipping = (read_or_refused(name, root, policy) for policy in POLICIES)
    finally:
        (root / file).write_bytes(FOLDERS[name].files[file])
    assert refusing in (None, skipping)


def test_the_complete_folders_are_read(place: tuple[str, Path]) -> None:
    """Otherwise the tests below would show nothing."""
    assert read_or_refused(*place, "refuse") is not None


@given(data=st.data(), content=st.binary(max_size=200))
@settings(max_examples=12)
def test_any_bytes_are_read_by_the_rules_or_refused(data: st.DataObject, content: bytes, place: tuple[str, Path]) -> None:
    check_both_policies(*place, data.draw(st.sampled_from(sorted(FOLDERS[place[0]].files))), content)


JUNK = st.binary(max_size=4) | st.sampled_from(
    [
        b"\r",
        b"\n",
        b'"',
        b"\t",
        b",",
        b"\0",
        b"\xff",
        b"../",
        b"/",
        b"\\ud83e",
        b"1" * 5000,
        b"[" * 5000,
        b"x" * 300,
        b"x" * 200_000,
        b"null",
        b"-1",
    ]
)


@given(data=st.data(), start=st.integers(0, 2000), cut=st.integers(0, 12), junk=JUNK)
@settings(max_examples=40)
def test_a_damaged_file_is_read_by_the_rules_or_refused(
    data: st.DataObject, start: int, cut: int, junk: bytes, place: tuple[str, Path]
) -> None:
    file = data.draw(st.sampled_from(sorted(FOLDERS[place[0]].files)))
    whole = FOLDERS[place[0]].files[file]
    at = start % len(whole)
    check_both_policies(*place, file, whole[:at] + junk + whole[at + cut :])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from(["", " ", "..", "/", "1.png", 1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), value=VALUES)
@settings(max_examples=30)
def test_a_replaced_value_is_read_by_the_rules_or_refused(data: st.DataObject, value: object, place: tuple[str, Path]) -> None:
    file, content = data.draw(st.sampled_from(sorted(FOLDERS[place[0]].files.items())))
    if place[0] in ("crisismmd", "csv"):
        fields = content.replace(b",", b"\t").split(b"\t")
        fields[data.draw(st.integers(0, len(fields) - 1))] = json.dumps(value).encode()
        check_both_policies(*place, file, (b"," if place[0] == "csv" else b"\t").join(fields))
        return
    values = [json.loads(line) for line in content.splitlines()]
    rows = values if isinstance(values[0], dict) and place[0] != "emojitwo" else values[0]
    rows = rows if isinstance(rows, list) else list(rows.values())
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.sampled_from(sorted(row)))] = value
    check_both_policies(*place, file, lines(*values))


def test_a_header_with_an_enormous_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(b"x" * 200_000 + b"\nrow\n")
    options = {"train": "train.csv", "columns": {"text": "text", "answer": "answer"}, "question": "Which?"}
    with pytest.raises(DataError, match=r"131,072 characters"):
        load_dataset("csv", DatasetRequest(tmp_path, 0, options=options))
