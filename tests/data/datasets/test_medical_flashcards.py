"""Medical flashcards: cards that are read, held out and refused. No card here comes from the dataset."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bad_rows import bad_rows
from fedmllm.data.datasets import load_dataset
from fedmllm.data.datasets.base import Dataset, DatasetRequest
from fedmllm.data.datasets.medical_flashcards import FILE, load
from fedmllm.errors import ConfigError, DataError


def card(number: int, **changes: object) -> dict[str, Any]:
    return {"instruction": "Answer this question truthfully", "input": f"What is {number}?", "output": f"It is {number}.", **changes}


def write(root: Path, cards: object) -> Path:
    (root / FILE).write_text(json.dumps(cards))
    return root


problems = partial(bad_rows, load)
"""The bad rows of a request."""


def numbers(dataset: Dataset) -> tuple[list[int], list[int]]:
    train, test = ([int(s.id.rpartition("-")[2]) for s in split] for split in (dataset.train, dataset.test))
    return train, test


def test_a_card_becomes_a_sample(tmp_path: Path) -> None:
    dataset = load(DatasetRequest(write(tmp_path, [card(i) for i in range(20)]), 0, validation_share=0))
    sample = {s.id: s for s in (*dataset.train, *dataset.test)}["medical_flashcards-00007"]

    assert (sample.question, sample.answer, sample.content) == ("Answer the question.", "It is 7.", {"text": "What is 7?"})
    assert (sample.options, sample.category, sample.answer_type) == ((), "flashcard", "open")
    assert (dataset.name, dataset.metric, dataset.modalities) == ("medical_flashcards", "accuracy", ("text",))
    assert load_dataset("medical_flashcards", DatasetRequest(tmp_path, 0, validation_share=0)) == dataset


@pytest.mark.parametrize(("options", "held"), [({}, 2), ({"test_share": 0.25}, 5), ({"test_share": 0.9}, 18)])
def test_a_share_is_held_out_by_the_seed(options: dict[str, float], held: int, tmp_path: Path) -> None:
    write(tmp_path, [card(i) for i in range(20)])

    def split(seed: int) -> tuple[list[int], list[int]]:
        return numbers(load(DatasetRequest(tmp_path, seed, options=options, validation_share=0)))

    train, test = split(0)
    assert (len(test), sorted(train + test)) == (held, list(range(20)))
    assert split(0) == (train, test)
    assert split(1) != (train, test)


def test_the_held_out_share_depends_on_positions_not_on_content(tmp_path: Path) -> None:
    before = numbers(load(DatasetRequest(write(tmp_path, [card(i) for i in range(20)]), 0, validation_share=0)))

    assert numbers(load(DatasetRequest(write(tmp_path, [card(7)] * 20), 0, validation_share=0))) == before


@pytest.mark.parametrize("share", [0, 1, -0.1, 2, float("nan"), "half"])
def test_a_share_that_leaves_a_split_empty_is_refused(share: object, tmp_path: Path) -> None:
    write(tmp_path, [card(i) for i in range(20)])

    with pytest.raises(ConfigError, match=r"data\.options\.test_share"):
        load(DatasetRequest(tmp_path, 0, options={"test_share": share}, validation_share=0))


def test_too_few_cards_for_a_share_are_refused(tmp_path: Path) -> None:
    """A tenth of four cards rounds to none."""
    assert problems(DatasetRequest(write(tmp_path, [card(i) for i in range(4)]), 0, validation_share=0)) == ["the test split is empty"]


def test_subsets_are_drawn_from_each_split(tmp_path: Path) -> None:
    write(tmp_path, [card(i) for i in range(40)])
    whole, part = (numbers(load(DatasetRequest(tmp_path, 0, *counts, validation_share=0))) for counts in ((), (5, 3)))

    assert [len(split) for split in part] == [5, 3]
    assert all(set(few) < set(many) for few, many in zip(part, whole, strict=True))


def test_numbers_padding_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    write(tmp_path, [card(i, input=" How\r\nmany? ", output=7) for i in range(20)])
    (tmp_path / FILE).write_bytes(b"\xef\xbb\xbf" + (tmp_path / FILE).read_bytes())
    dataset = load(DatasetRequest(tmp_path, 0, validation_share=0))

    assert {(s.answer, str(s.content["text"])) for s in dataset.train} == {("7", "How many?")}


def test_bad_cards_are_named_at_once_or_skipped(tmp_path: Path) -> None:
    """The remaining cards keep their positions, and so their ids."""
    cards = [*(card(i) for i in range(16)), card(16, output=""), card(17, input=None), {"input": "?"}, "card"]
    write(tmp_path, cards)
    messages = [
        f"{FILE}[16]: output must be text that is not empty, got ''",
        f"{FILE}[17]: input must be text that is not empty, got None",
        f"{FILE}[18]: lacks output",
        f"{FILE}[19]: must be an object with keys, got 'card'",
    ]

    assert problems(DatasetRequest(tmp_path, 0, validation_share=0)) == messages
    dataset = load(DatasetRequest(tmp_path, 0, on_bad_sample="skip", validation_share=0))
    assert dataset.notes == ("4 bad row(s) skipped", *messages, "cards: 16, published: 33,955")
    train, test = numbers(dataset)
    assert sorted(train + test) == list(range(16))


@pytest.mark.parametrize(
    ("content", "message"), [(b"{}", "must be a list of rows"), (b'["\xff"]', "JSON in UTF-8"), (b"[", "JSON in UTF-8")]
)
def test_a_file_that_is_not_a_json_list_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)

    with pytest.raises(DataError, match=rf"{FILE}: must be .*{message.removeprefix('must be ')}"):
        load(DatasetRequest(tmp_path, 0, validation_share=0))


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    assert problems(DatasetRequest(tmp_path, 0, validation_share=0)) == [f"{FILE} (missing)"]
    assert problems(DatasetRequest(write(tmp_path, []), 0, validation_share=0)) == ["the train split is empty", "the test split is empty"]
    with pytest.raises(ConfigError, match=r"data\.options\.share: "):
        load(DatasetRequest(tmp_path, 0, options={"share": 0.1}, validation_share=0))
