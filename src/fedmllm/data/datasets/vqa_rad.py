"""VQA-RAD: questions that clinicians asked about radiology images, and their answers.

J. J. Lau, S. Gayen, A. Ben Abacha and D. Demner-Fushman, "A dataset of clinically generated visual questions and
answers about radiology images", Scientific Data 5, 2018. CC0 1.0.

Two layouts are in circulation, told apart by their files:

    original      one file, whose ``phrase_type`` says the split
    repackaged    a file for each split, plus training rows of type ``frame``, questions made from a template. They are
                  left out: the publication counts none, and 21 repeat question, answer and image of a test row.

One row, and the sample it becomes:

    {"qid": 33, "image_name": "synpic1.jpg", "image_organ": "CHEST", "question": "Are there >12 of ribs? ",
     "answer": 12, "answer_type": "CLOSED ", "phrase_type": "test_para", ...}
    Sample(id="vqa_rad-test-33", question="Are there >12 of ribs?", answer="12", category="CHEST", answer_type="closed",
           content={"image": root / "VQA_RAD Image Folder" / "synpic1.jpg"})

``question_type``, with its typos and comma pairs, is not read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown  # shortens long and deep values
from typing import Literal

from fedmllm.data.datasets.base import Dataset, DatasetRequest, take
from fedmllm.errors import ConfigError, DataError, listing
from fedmllm.types import AnswerType, Record, Sample

PUBLISHED = {"train": 1797, "test": 451}
"""Questions in each split of the publication."""

KEYS = ("qid", "phrase_type", "image_name", "image_organ", "question", "answer", "answer_type")
ORGANS = ("HEAD", "CHEST", "ABD")
ANSWER_TYPES: Mapping[str, AnswerType] = {"OPEN": "open", "CLOSED": "closed"}

Fate = Literal["train", "test", "left out"]


@dataclass(frozen=True)
class Layout:
    """Where things are: by file name, what becomes of its rows by their ``phrase_type``; and the folder of pictures."""

    files: Mapping[str, Mapping[str, Fate]]
    images: str


_ORIGINAL: Mapping[str, Fate] = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
_TRAIN: Mapping[str, Fate] = {"freeform": "train", "para": "train", "frame": "left out"}
_TEST: Mapping[str, Fate] = {"freeform": "test", "para": "test"}
LAYOUTS: Mapping[str, Layout] = {
    "original": Layout({"VQA_RAD Dataset Public.json": _ORIGINAL}, "VQA_RAD Image Folder"),
    "repackaged": Layout({"trainset.json": _TRAIN, "testset.json": _TEST}, "images"),
}
"""In the order they are looked for."""


@dataclass(frozen=True)
class _Row:
    """An item of a file's list: where it stands, its keys and values, and what becomes of it."""

    where: str
    record: Record
    fate: Fate


def load(request: DatasetRequest) -> Dataset:
    """Both splits of the publication; scored by exact-match accuracy, label skew is over the organ.

    Raises:
        ConfigError: if the request names no folder.
        DataError: if neither layout is complete, a split is empty or rows break a rule of the format: not an object, a
            key missing, an unknown type or organ, no question or answer, a ``qid`` twice, no such image. All such rows
            are reported at once, by file and index (from 0).
    """
    if request.root is None:
        raise ConfigError("data.root: vqa_rad reads files; give the folder that holds them, e.g. data.root=/path/to/vqa_rad")
    name = _recognize(request.root)
    splits, left_out = _read(request.root, LAYOUTS[name])
    train = take(splits["train"], request.num_train, request.seed, "train")
    test = take(splits["test"], request.num_test, request.seed, "test")
    notes = (f"read from the {name} layout", *_count_notes(splits, left_out), _overlap_note(train, test))
    return Dataset("vqa_rad", "accuracy", train, test, ("image",), notes=notes)


def _recognize(root: Path) -> str:
    """The first layout whose files and folder are all there."""
    wanted = []
    for name, layout in LAYOUTS.items():
        there = {file: (root / file).is_file() for file in layout.files} | {f"{layout.images}/": (root / layout.images).is_dir()}
        if all(there.values()):
            return name
        wanted.append(f"{name}: " + ", ".join(f"{item} ({'found' if found else 'missing'})" for item, found in there.items()))
    raise DataError(f"{root}: holds no complete copy of VQA-RAD; looked for all the files of one of these layouts:\n{listing(wanted)}")


def _read(root: Path, layout: Layout) -> tuple[dict[str, list[Sample]], int]:
    """Samples by split, and how many rows were left out."""
    problems: list[str] = []
    images = root / layout.images
    rows = [row for file, fates in layout.files.items() for row in _rows(root / file, fates, problems)]
    kept = [row for row in rows if row.fate != "left out"]
    problems += [f"{row.where}: {problem}" for row in kept for problem in _problems(row.record, images)]
    problems += _repeated(kept)
    if problems:
        raise DataError(f"{root}: breaks rules of VQA-RAD's format; correct the rows or download the files again:\n{listing(problems)}")
    return {split: [_sample(row, images) for row in kept if row.fate == split] for split in PUBLISHED}, len(rows) - len(kept)


def _rows(path: Path, fates: Mapping[str, Fate], problems: list[str]) -> Iterator[_Row]:
    """The rows whose fate is known; the others are added to ``problems``."""
    for index, record in enumerate(_json_list(path, problems)):
        where = f"{path.name}[{index}]"
        if not isinstance(record, dict):
            problems.append(f"{where}: must be an object with keys, is {shown(record)}")
        elif missing := [key for key in KEYS if key not in record]:
            problems.append(f"{where}: lacks {', '.join(missing)}")
        elif (phrase_type := _words(record["phrase_type"])) not in fates:
            problems.append(f"{where}: phrase_type must be one of {', '.join(fates)}, is {shown(record['phrase_type'])}")
        else:
            yield _Row(where, record, fates[phrase_type])


def _json_list(path: Path, problems: list[str]) -> list[object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON or a number of too many digits
        problems.append(f"{path.name}: must be JSON in UTF-8 ({error})")
        return []
    if not isinstance(values, list):
        problems.append(f"{path.name}: must be a list of rows, is {shown(values)}")
        return []
    return values


def _problems(record: Record, images: Path) -> Iterator[str]:
    """Each rule that a row breaks."""
    for key in ("question", "answer"):
        if not _words(record[key]):
            yield f"{key} must be text that is not empty, is {shown(record[key])}"
    for key, known in {"answer_type": ANSWER_TYPES, "image_organ": ORGANS}.items():
        if _words(record[key]) not in known:
            yield f"{key} must be one of {', '.join(known)}, is {shown(record[key])}"
    if not re.fullmatch("[0-9]+", _words(record["qid"])):
        yield f"qid must be a whole number, is {shown(record['qid'])}"
    name = record["image_name"]
    # Judged by its spelling: links are the user's own doing, names are the download's.
    if not isinstance(name, str) or Path(name).anchor or ".." in Path(name).parts:
        yield f"image_name must be a path inside {images.name}/, is {shown(name)}"
    elif not os.path.isfile(images / name):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        yield f"image_name {shown(name)} is no file in {images.name}/"


def _repeated(rows: Sequence[_Row]) -> Iterator[str]:
    first: dict[str, str] = {}
    for row in rows:
        qid = _words(row.record["qid"])
        if qid and first.setdefault(qid, row.where) != row.where:
            yield f"{row.where}: qid must occur once, {shown(qid)} is also at {first[qid]}"


def _sample(row: _Row, images: Path) -> Sample:
    text = {key: _words(row.record[key]) for key in KEYS}
    return Sample(
        id=f"vqa_rad-{row.fate}-{text['qid']}",
        question=text["question"],
        answer=text["answer"],
        content={"image": images / row.record["image_name"]},
        category=text["image_organ"],
        answer_type=ANSWER_TYPES[text["answer_type"]],
    )


def _words(value: object) -> str:
    """Text or a whole number as text with single spaces; empty for all else, half a surrogate pair (no UTF-8) included."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ""
    text = " ".join(str(value).split())
    return "" if re.search(r"[\ud800-\udfff]", text) else text


def _count_notes(splits: Mapping[str, Sequence[Sample]], left_out: int) -> Iterator[str]:
    sizes = {split: len(samples) for split, samples in splits.items()}
    found, published = (f"{n['train']:,} train and {n['test']:,} test" for n in (sizes, PUBLISHED))
    yield f"the files hold {found} questions, " + ("as published" if sizes == PUBLISHED else f"published are {published}")
    if left_out:
        yield f"{left_out:,} training rows of phrase_type frame were left out: the published split has none"


def _overlap_note(train: Sequence[Sample], test: Sequence[Sample]) -> str:
    seen, asked = ({sample.content["image"] for sample in samples} for samples in (train, test))
    return f"{len(asked & seen)} of the {len(asked)} test images also occur in train"
