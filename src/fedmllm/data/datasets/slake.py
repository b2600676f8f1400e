"""SLAKE 1.0: questions in English and Chinese about radiology images, and their answers.

B. Liu et al., "SLAKE: A Semantically-Labeled Knowledge-Enhanced Dataset for Medical Visual Question Answering", ISBI 2021.
CC BY 4.0.

Files: train.json, validate.json (validation.json on Hugging Face), test.json; images at imgs/xmlabN/source.jpg. A row,
and the sample it becomes:

    {"img_id": 102, "img_name": "xmlab102/source.jpg", "question": "What modality is used to take this image?",
     "answer": "CT", "q_lang": "en", "modality": "CT", "answer_type": "OPEN", "content_type": "Modality", "qid": 11934, ...}
    Sample(id="slake-test-11934", question="What modality is used to take this image?", answer="CT",
           category="Modality", answer_type="open", content={"image": root / "imgs/xmlab102/source.jpg"})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from fedmllm.data.datasets.base import Dataset, DatasetOptions, DatasetRequest, Split, count_note
from fedmllm.data.datasets.files import json_list, require
from fedmllm.data.datasets.rows import Row, Sieve, words_of
from fedmllm.types import AnswerType, Sample

ANSWER_TYPES: Mapping[str, AnswerType] = {"OPEN": "open", "CLOSED": "closed"}
LANGUAGES: Mapping[str, tuple[str, ...]] = {"en": ("en",), "zh": ("zh",), "all": ("en", "zh")}
PUBLISHED: Mapping[str, Mapping[str, int]] = {
    "en": {"train": 4919, "validate": 1053, "test": 1061},
    "zh": {"train": 4916, "validate": 1046, "test": 1033},
    "all": {"train": 9835, "validate": 2099, "test": 2094},
}
"""Numbers of questions by language and split."""
UNANSWERED = ("1622",)
"""Questions published without an answer (training split, English). They are counted but not used."""


class Options(DatasetOptions):
    """The questions to use."""

    language: Literal["en", "zh", "all"] = "en"
    """Language of the questions: English (as in the benchmark), Chinese, or both."""
    test: Literal["test", "validate"] = "test"
    """File to evaluate on."""
    images: bool = True
    """If false, only the question files are needed, and the question becomes the text of the sample."""


def load(request: DatasetRequest) -> Dataset:
    """Load SLAKE. ``validate`` is the validation split unless it is the file to evaluate on.

    The score is exact-match accuracy, and label skew is over ``content_type``.

    Raises:
        DataError: if files are missing or rows are invalid; the message lists all of them.
    """
    root, options = request.folder("slake"), request.options_as(Options)
    named = {"validate": "validate" if (root / "validate.json").is_file() else "validation"}
    parts: dict[Split, str] = {"train": "train", "test": options.test}
    if options.test == "test" and (root / f"{named['validate']}.json").is_file():
        parts["validation"] = "validate"
    files = {part: f"{named.get(part, part)}.json" for part in parts.values()}
    require(root, (*files.values(), *(("imgs",) if options.images else ())), "SLAKE")
    sieve = Sieve(str(root), request.on_bad_sample)
    rows = {part: list(json_list(root / file)) for part, file in files.items()}
    read = {split: sieve.samples(rows[part], partial(_sample, root, options, part)) for split, part in parts.items()}
    notes = (*sieve.finish(), *(_count_note(part, rows[part], options.language) for part in files))
    return request.dataset("slake", "accuracy", read, ("image",) if options.images else ("text",), notes)


def _sample(root: Path, options: Options, split: str, row: Row) -> Sample | None:
    if row.choice("q_lang", {"en": "en", "zh": "zh"}) not in LANGUAGES[options.language]:
        return None
    if _unanswered(row):
        return None
    question = row.text("question")
    return Sample(
        id=f"slake-{split}-{row.text('qid')}",
        question=question if options.images else "Answer the question.",
        answer=row.text("answer"),
        content={"image": row.file("img_name", root / "imgs")} if options.images else {"text": question},
        category=row.text("content_type"),
        answer_type=row.choice("answer_type", ANSWER_TYPES),
    )


def _unanswered(row: Row) -> bool:
    return words_of(row.record.get("qid")) in UNANSWERED and row.record.get("answer") in ("", None)


def _count_note(split: str, rows: Sequence[Row], language: str) -> str:
    asked = [row for row in rows if words_of(row.record.get("q_lang")) in LANGUAGES[language]]
    empty = sum(map(_unanswered, asked))
    note = count_note(f"{split}: questions ({language})", (len(asked),), (PUBLISHED[language][split],))
    return note + (f"; {empty} without an answer left out" if empty else "")
