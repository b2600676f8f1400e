"""Digests of samples' content, and repeated samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from fedmllm.data.content import changed, content_digest, repeated, sample_digest
from fedmllm.data.datasets.base import Dataset
from fedmllm.data.federated import load
from fedmllm.data.settings import DataConfig
from fedmllm.errors import DataError
from fedmllm.types import Edit, EditedImage, Sample


def sample(name: str, picture: Image.Image | bytes | Path | None = None, text: str = "words", answer: str = "yes") -> Sample:
    content = {"text": text} | ({} if picture is None else {"image": picture})
    return Sample(name, "Is it?", answer, content, ("no", "yes"))


def square(shade: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (shade, 0, 0))


def test_a_files_digest_is_that_of_its_current_content_under_any_name(tmp_path: Path) -> None:
    for name, shade in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        square(shade).save(tmp_path / name)
    a, b, c = (content_digest(tmp_path / name) for name in ("a.png", "b.png", "c.png"))
    assert a == b == content_digest((tmp_path / "a.png").read_bytes()) != c
    square(3).resize((5, 5)).save(tmp_path / "a.png")
    assert content_digest(tmp_path / "a.png") != a


def test_a_samples_digest_covers_question_content_and_answer() -> None:
    one = sample("a", square(1))
    others = [
        replace(one, question="Was it?"),
        replace(one, answer="no"),
        replace(one, options=("yes", "no")),
        sample("a", square(2)),
        sample("a", square(1), "other"),
        sample("a"),
        sample("a", square(1).convert("L")),
        replace(one, content={**one.content, "image": EditedImage(square(1), (Edit("blur", 1, 0),))}),
        replace(one, content={**one.content, "image": EditedImage(square(1), (Edit("blur", 1, 1),))}),
    ]
    assert len({sample_digest(other) for other in (one, *others)}) == 10
    assert sample_digest(replace(one, id="b", client="x", category="y", domain="z")) == sample_digest(one)


def splits() -> Dataset:
    train = (sample("1", text="a"), sample("2", text="b"), sample("3", text="a"), sample("4", square(1)), sample("5", square(2)))
    return Dataset("d", "auc", train, (sample("6", text="b"), sample("7", square(1), "other")), ("image", "text"))


def test_repeated_rows_and_pictures_are_counted_and_can_be_left_out() -> None:
    report = repeated(splits(), leave_out=False)
    assert report.train == splits().train
    assert report.notes == (
        "1 training sample(s) repeat another one; data.deduplicate leaves them out",
        "1 training sample(s) are also in the test split; data.deduplicate leaves them out",
        "1 training sample(s) show an image of the test split; data.deduplicate leaves them out",
    )
    left = repeated(splits(), leave_out=True)
    assert [s.id for s in left.train] == ["1", "5"]
    assert left.notes[0] == "1 training sample(s) repeat another one; left out"
    assert left.test == splits().test
    assert repeated(left, leave_out=False).notes == left.notes


def test_repetition_across_the_validation_part_is_found() -> None:
    both = splits()
    dataset = replace(both, train=both.train[-1:], validation=tuple(replace(s, id=f"v{s.id}") for s in (both.train[-1], both.test[0])))
    assert [note.partition(";")[0] for note in repeated(dataset, leave_out=False).notes] == [
        "1 training sample(s) are also in the validation split",
        "1 validation sample(s) are also in the test split",
    ]
    spare = replace(both.train[-1], id="spare", question="Another?")
    left = repeated(replace(dataset, train=(*dataset.train, spare)), leave_out=True)
    assert ([s.id for s in left.train], [s.id for s in left.validation]) == (["spare"], [f"v{both.train[-1].id}"])


def test_deduplication_applies_to_own_files(tmp_path: Path) -> None:
    for name, texts in (("train", "abcb"), ("test", "cd")):
        rows = [{"t": text, "a": "yes" if text in "ac" else "no"} for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "train": "train.jsonl",
        "test": "test.jsonl",
        "columns": {"text": "t", "answer": "a"},
        "question": "?",
        "choices": ["no", "yes"],
    }
    config = DataConfig(dataset="jsonl", root=tmp_path, options=options)
    assert len(load(config, 0).train) == 4
    assert [s.content["text"] for s in load(config.model_copy(update={"deduplicate": True}), 0).train] == ["a", "b"]


def test_a_split_with_only_repeated_samples_is_refused() -> None:
    data = replace(splits(), train=(sample("1", text="b"),))
    with pytest.raises(DataError, match="the train split is empty"):
        repeated(data, leave_out=True)


def test_changed_missing_and_new_samples_are_named() -> None:
    assert changed({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}) == [
        "b has different content",
        "c is missing",
        "d is new",
    ]
