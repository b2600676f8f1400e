"""VQA-RAD: questions that clinicians asked about radiology images, and their answers.

J. J. Lau, S. Gayen, A. Ben Abacha and D. Demner-Fushman, "A dataset of clinically generated visual questions and
answers about radiology images", Scientific Data 5, 2018. CC0 1.0.

Two layouts are in circulation and are recognized by their files:

    original      one file, whose ``phrase_type`` names the split
    repackaged    a file for each split, plus training rows of type ``frame`` with questions made from a template. These are
                  left out: the publication does not count them, and 21 repeat question, answer and image of a test row.

A row, and the sample it becomes:

    {"qid": 33, "image_name": "synpic1.jpg", "image_organ": "CHEST", "question": "Are there >12 of ribs? ",
     "answer": 12, "answer_type": "CLOSED ", "phrase_type": "test_para", ...}
    Sample(id="vqa_rad-test-33", question="Are there >12 of ribs?", answer="12", category="CHEST", answer_type="closed",
           content={"image": root / "VQA_RAD Image Folder" / "synpic1.jpg"})

``question_type``, with its typos and comma pairs, is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from fedmllm.data.datasets.base import Dataset, DatasetOptions, DatasetRequest, Split
from fedmllm.data.datasets.files import json_list
from fedmllm.data.datasets.rows import Row, RowError, Sieve, shown, words_of
from fedmllm.errors import DataError, listing
from fedmllm.types import AnswerType, Content, Sample

PUBLISHED: Mapping[Split, int] = {"train": 1797, "test": 451}
"""Numbers of questions in each split of the publication."""

ORGANS = ("HEAD", "CHEST", "ABD")
ANSWER_TYPES: Mapping[str, AnswerType] = {"OPEN": "open", "CLOSED": "closed"}

Fate = Literal["train", "test", "left out"]


@dataclass(frozen=True)
class Layout:
    """The files of a layout, with the split of their rows by ``phrase_type``, and the folder of images."""

    files: Mapping[str, Mapping[str, Fate]]
    images: str


_ORIGINAL: Mapping[str, Fate] = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
_TRAIN: Mapping[str, Fate] = {"freeform": "train", "para": "train", "frame": "left out"}
_TEST: Mapping[str, Fate] = {"freeform": "test", "para": "test"}
LAYOUTS: Mapping[str, Layout] = {
    "original": Layout({"VQA_RAD Dataset Public.json": _ORIGINAL}, "VQA_RAD Image Folder"),
    "repackaged": Layout({"trainset.json": _TRAIN, "testset.json": _TEST}, "images"),
}
"""The layouts, in the order in which they are tried."""


class Options(DatasetOptions):
    """The questions to train on."""

    image_disjoint: bool = False
    """Leave out training questions about images of the test split. In the published split, nearly all test images also occur in training."""


def load(request: DatasetRequest) -> Dataset:
    """Load both splits of the publication. The score is exact-match accuracy, and label skew is over the organ.

    Raises:
        ConfigError: if the request names no folder.
        DataError: if neither layout is complete, a split is empty, or rows are invalid: not an object, a missing key, an
            unknown type or organ, no question or answer, a repeated ``qid``, or a missing image. The message lists all such
            rows by file and index (from 0), each with the first rule that it breaks.
    """
    root, options = request.folder("vqa_rad"), request.options_as(Options)
    name = _recognize(root)
    # A qid must be unique across all files and splits.
    sieve = Sieve(str(root), request.on_bad_sample, identity=lambda sample: sample.id.rpartition("-")[2])
    splits, left_out = _read(root, LAYOUTS[name], sieve)
    notes = (f"read from the {name} layout", *sieve.finish(), *_count_notes(splits, left_out))
    if options.image_disjoint:
        splits["train"], note = _without(splits["train"], _images(splits["test"]))
        notes += (note,)
    dataset = request.dataset("vqa_rad", "accuracy", splits, ("image",), notes)
    return replace(dataset, notes=(*dataset.notes, _overlap_note(dataset.train, dataset.test)))


def _recognize(root: Path) -> str:
    """Return the first layout whose files and folder all exist."""
    wanted = []
    for name, layout in LAYOUTS.items():
        there = {file: (root / file).is_file() for file in layout.files} | {f"{layout.images}/": (root / layout.images).is_dir()}
        if all(there.values()):
            return name
        wanted.append(f"{name}: " + ", ".join(f"{item} ({'found' if found else 'missing'})" for item, found in there.items()))
    raise DataError(f"{root}: contains no complete copy of VQA-RAD; it must contain all files of one of these layouts:\n{listing(wanted)}")


def _read(root: Path, layout: Layout, sieve: Sieve) -> tuple[dict[Split, list[Sample]], int]:
    """Return the samples by split, and the number of rows left out."""
    splits: dict[Split, list[Sample]] = {split: [] for split in PUBLISHED}
    left_out = 0
    for file, fates in layout.files.items():
        rows = list(json_list(root / file))
        samples = sieve.samples(rows, partial(_sample, root / layout.images, fates))
        for split, chosen in splits.items():
            chosen += [sample for sample in samples if sample.id.startswith(f"vqa_rad-{split}-")]
        left_out += sum(fates.get(words_of(row.record.get("phrase_type"))) == "left out" for row in rows)
    return splits, left_out


def _sample(images: Path, fates: Mapping[str, Fate], row: Row) -> Sample | None:
    fate = row.choice("phrase_type", fates)
    if fate == "left out":
        return None
    qid = row.text("qid")
    if not re.fullmatch("[0-9]+", qid):
        raise RowError(f"qid must be an integer, got {shown(row.value('qid'))}")
    return Sample(
        id=f"vqa_rad-{fate}-{qid}",
        question=row.text("question"),
        answer=row.text("answer"),
        content={"image": row.file("image_name", images)},
        category=row.choice("image_organ", {organ: organ for organ in ORGANS}),
        answer_type=row.choice("answer_type", ANSWER_TYPES),
    )


def _images(samples: Sequence[Sample]) -> set[Content]:
    return {sample.content["image"] for sample in samples}


def _without(train: Sequence[Sample], tested: Set[Content]) -> tuple[list[Sample], str]:
    """Return the training samples about images outside the test split, and a note on the rest."""
    kept = [sample for sample in train if sample.content["image"] not in tested]
    gone, shared = len(train) - len(kept), len(_images(train) & tested)
    return kept, f"image_disjoint: {gone:,} training questions about {shared} test images were left out, {len(kept):,} are left"


def _count_notes(splits: Mapping[Split, Sequence[Sample]], left_out: int) -> Iterator[str]:
    sizes = {split: len(samples) for split, samples in splits.items()}
    found, published = (f"{n['train']:,} train and {n['test']:,} test" for n in (sizes, PUBLISHED))
    yield f"the files hold {found} questions, " + ("as published" if sizes == PUBLISHED else f"published: {published}")
    if left_out:
        yield f"{left_out:,} training rows of phrase_type frame were left out: the published split has none"


def _overlap_note(train: Sequence[Sample], test: Sequence[Sample]) -> str:
    asked = _images(test)
    return f"{len(asked & _images(train))} of the {len(asked)} test images also occur in train"
