"""NLVR: is a sentence about an image true? Two classes, AUC; a redistributable substitute for Hateful Memes.

A. Suhr, M. Lewis, J. Yeh and Y. Artzi, "A Corpus of Natural Language for Visual Reasoning", ACL 2017. CC BY 4.0.

Files: ``{split}/{split}.json``, JSON lines, and ``{split}/images/{directory}/{split}-{identifier}-{k}.png`` for box orders k;
order 0 is used. A row, and the sample it becomes:

    {"sentence": "Each grey box contains atleast one yellow object", "label": "true", "identifier": "1572-0", "directory": "2"}
    Sample(id="nlvr-dev-1572-0", question="Is it true?", answer="yes", options=("no", "yes"),
           content={"image": root / "dev/images/2/dev-1572-0-0.png", "text": "Each grey box ..."}, client="1572")

The same sentence is used with several images. The dev file is the validation split, or the training split if there is no training file.
A group of samples with one sentence (the part of ``identifier`` before the dash) never spans two splits, held-out ones included.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fedmllm.data.datasets.base import Dataset, DatasetOptions, DatasetRequest, Split, count_note
from fedmllm.data.datasets.files import json_lines, require
from fedmllm.data.datasets.rows import Row, RowError, Sieve, shown
from fedmllm.types import Sample

QUESTION = "Is it true?"
OPTIONS = ("no", "yes")
PUBLISHED: Mapping[str, tuple[int, ...]] = {"dev": (442, 547), "test": (434, 556)}
"""Numbers of false and true sentences by split. For train, only their sum is published."""


def load(request: DatasetRequest) -> Dataset:
    """Load NLVR, with ``train`` (or ``dev`` if it is missing) for training and ``test`` for testing. The score is the area under the ROC curve.

    Raises:
        DataError: if files are missing or rows are invalid; the message lists all of them.
    """
    root = request.folder("nlvr")
    request.options_as(DatasetOptions)  # refuses all options, because this dataset has none
    files = _files({name for name in ("train", "dev") if (root / name / f"{name}.json").is_file()})
    require(root, tuple(f"{name}/{part}" for name in files.values() for part in (f"{name}.json", "images")), "NLVR")
    sieve = Sieve(str(root), request.on_bad_sample)
    read = {split: sieve.samples(json_lines(root / name / f"{name}.json"), partial(_sample, root, name)) for split, name in files.items()}
    summary = f"trained on {files['train']}, tested on test" + (", validated on dev" if "validation" in files else "")
    notes = (summary, *sieve.finish(), *_label_notes({files[split]: rows for split, rows in read.items()}))
    return request.dataset("nlvr", "auc", read, ("image", "text"), notes, together=lambda sample: sample.client)


def _files(there: set[str]) -> dict[Split, str]:
    """Return the file of each split."""
    if "train" not in there:
        return {"train": "dev", "test": "test"}
    files: dict[Split, str] = {"train": "train", "test": "test"}
    return {**files, "validation": "dev"} if "dev" in there else files


def _sample(root: Path, split: str, row: Row) -> Sample:
    answer = row.choice("label", {"false": "no", "true": "yes"})
    identifier, directory = row.text("identifier"), row.text("directory")
    if not re.fullmatch(r"\d+-\d+", identifier) or not re.fullmatch(r"\d+", directory):
        raise RowError(f"identifier and directory must be numbers as in 1572-0 and 2, got {shown(identifier)} and {shown(directory)}")
    name = f"{split}/images/{directory}/{split}-{identifier}-0.png"
    return Sample(
        id=f"nlvr-{split}-{identifier}",
        question=QUESTION,
        answer=answer,
        options=OPTIONS,
        category=answer,
        content={"image": Row(row.where, {"image": name}).file("image", root), "text": row.text("sentence")},
        client=identifier.partition("-")[0],
    )


def _label_notes(splits: Mapping[str, list[Sample]]) -> tuple[str, ...]:
    found = {split: Counter(sample.answer for sample in rows) for split, rows in splits.items()}
    counts = {split: tuple(found[split][option] for option in OPTIONS) for split in splits}
    return tuple(count_note(f"{split}: false and true sentences", counts[split], PUBLISHED.get(split)) for split in splits)
