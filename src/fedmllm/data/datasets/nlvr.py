"""NLVR: is a sentence about a picture true? Two classes, AUC; a redistributable stand-in for Hateful Memes.

A. Suhr, M. Lewis, J. Yeh and Y. Artzi, "A Corpus of Natural Language for Visual Reasoning", ACL 2017. CC BY 4.0.

Files: ``{split}/{split}.json``, JSON lines, and ``{split}/images/{directory}/{split}-{identifier}-{k}.png`` for box orders k;
order 0 is used. One row, and the sample it becomes:

    {"sentence": "Each grey box contains atleast one yellow object", "label": "true", "identifier": "1572-0", "directory": "2"}
    Sample(id="nlvr-dev-1572-0", question="Is it true?", answer="yes", options=("no", "yes"),
           content={"image": root / "dev/images/2/dev-1572-0-0.png", "text": "Each grey box ..."}, client="1572")

The same sentence is asked of several pictures. Where the training file is not at hand, the dev file is trained on; the
splits share no sentence's group (the part of ``identifier`` before the dash).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fedmllm.data.datasets.base import Dataset, DatasetOptions, DatasetRequest, count_note
from fedmllm.data.datasets.files import json_lines, require
from fedmllm.data.datasets.rows import Row, RowError, Sieve, shown
from fedmllm.types import Sample

QUESTION = "Is it true?"
OPTIONS = ("no", "yes")
PUBLISHED: Mapping[str, tuple[int, ...]] = {"dev": (442, 547), "test": (434, 556)}
"""False and true sentences by split; of train only the number of both is published."""


def load(request: DatasetRequest) -> Dataset:
    """Trained on ``train`` if it is there, else ``dev``; tested on ``test``; scored by the area under the ROC curve.

    Raises:
        DataError: if files are missing or rows break a rule; all at once.
    """
    root = request.folder("nlvr")
    request.options_as(DatasetOptions)  # there are none to choose
    trained = "train" if (root / "train" / "train.json").is_file() else "dev"
    require(root, tuple(f"{split}/{name}" for split in (trained, "test") for name in (f"{split}.json", "images")), "NLVR")
    sieve = Sieve(str(root), request.on_bad_sample)
    train, test = (sieve.samples(json_lines(root / split / f"{split}.json"), partial(_sample, root, split)) for split in (trained, "test"))
    notes = (f"trained on {trained}, tested on test", *sieve.finish(), *_label_notes({trained: train, "test": test}))
    return Dataset("nlvr", "auc", *request.take(train, test), ("image", "text"), notes=notes)


def _sample(root: Path, split: str, row: Row) -> Sample:
    answer = row.choice("label", {"false": "no", "true": "yes"})
    identifier, directory = row.text("identifier"), row.text("directory")
    if not re.fullmatch(r"\d+-\d+", identifier) or not re.fullmatch(r"\d+", directory):
        raise RowError(f"identifier and directory must be numbers as in 1572-0 and 2, are {shown(identifier)} and {shown(directory)}")
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
