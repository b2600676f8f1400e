"""Hateful Memes: is a meme hateful? Two classes, AUC; often only image and text together show it.

D. Kiela et al., "The Hateful Memes Challenge: Detecting Hate Speech in Multimodal Memes", NeurIPS 2020. The license does
not allow redistribution: download the files from its authors.

Two releases are in circulation and are recognized by their files. They have the same training ids, but 823 of the labels differ:

    first    train.jsonl, dev.jsonl, test.jsonl (without labels); evaluated on dev
    later    train.jsonl, dev_seen.jsonl, dev_unseen.jsonl, test_seen.jsonl, test_unseen.jsonl; evaluated on test_seen

A row as the files hold them (invented), and the sample it becomes:

    {"id": "00042", "img": "img/00042.png", "label": 0, "text": "me on the first day of spring"}
    Sample(id="hateful_memes-train-img/00042.png", question="Is it hateful?", answer="no", options=("no", "yes"),
           category="no", content={"image": root / "img/00042.png", "text": "me on the first day of spring"})

``id`` is an integer in one release and a zero-padded string in the other, so ``img`` identifies rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from fedmllm.data.datasets.base import Dataset, DatasetOptions, DatasetRequest, Split, count_note
from fedmllm.data.datasets.files import json_lines, require
from fedmllm.data.datasets.rows import Row, Sieve
from fedmllm.errors import ConfigError
from fedmllm.types import Sample

QUESTION = "Is it hateful?"
OPTIONS = ("no", "yes")
PUBLISHED: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "first": {"train": (5450, 3050), "dev": (250, 250)},
    "later": {
        "train": (5481, 3019),
        "dev_seen": (253, 247),
        "dev_unseen": (340, 200),
        "test_seen": (510, 490),
        "test_unseen": (1250, 750),
    },
}
"""Numbers of rows with label 0 and 1 by release and file."""

TEST = {"first": "dev", "later": "test_seen"}
VALIDATION = {"first": (), "later": ("dev_seen", "dev_unseen")}
"""Candidates for the validation split: the first file that exists and is not used for evaluation."""


class Options(DatasetOptions):
    """The rows to evaluate on."""

    test: Literal["dev", "dev_seen", "dev_unseen", "test_seen", "test_unseen"] | None = None
    """File to evaluate on; null selects ``test_seen`` (later release) or ``dev`` (first release)."""


def load(request: DatasetRequest) -> Dataset:
    """Load Hateful Memes, with a validation split if the release has another labeled file. The score is the area under the ROC curve.

    Raises:
        ConfigError: if the evaluation file does not belong to the release found.
        DataError: if files are missing or rows are invalid; the message lists all of them.
    """
    root, options = request.folder("hateful_memes"), request.options_as(Options)
    release = "first" if (root / "dev.jsonl").is_file() and not (root / "dev_seen.jsonl").is_file() else "later"
    evaluated = options.test or TEST[release]
    if evaluated not in PUBLISHED[release]:
        raise ConfigError(
            f"data.options.test: {evaluated} is not a labeled file of the {release} release, which {root} contains; "
            f"choose from {', '.join(list(PUBLISHED[release])[1:])}"
        )
    files: dict[Split, str] = {"train": "train", "test": evaluated}
    if spare := [name for name in VALIDATION[release] if name != evaluated and (root / f"{name}.jsonl").is_file()]:
        files["validation"] = spare[0]
    require(root, ("img", *(f"{name}.jsonl" for name in files.values())), "Hateful Memes")
    sieve = Sieve(str(root), request.on_bad_sample)
    read = {split: sieve.samples(json_lines(root / f"{name}.jsonl"), partial(_sample, root, name)) for split, name in files.items()}
    notes = (f"read from the {release} release, evaluated on {evaluated}", *sieve.finish())
    notes += tuple(_label_note(files[split], rows, PUBLISHED[release][files[split]]) for split, rows in read.items())
    return request.dataset("hateful_memes", "auc", read, ("image", "text"), notes)


def _sample(root: Path, split: str, row: Row) -> Sample:
    answer = row.choice("label", {"0": "no", "1": "yes"})
    image = row.file("img", root)
    return Sample(
        id=f"hateful_memes-{split}-{image.relative_to(root).as_posix()}",
        question=QUESTION,
        answer=answer,
        options=OPTIONS,
        category=answer,
        content={"image": image, "text": row.text("text")},
    )


def _label_note(name: str, samples: list[Sample], published: tuple[int, int]) -> str:
    found = Counter(sample.answer for sample in samples)
    return count_note(f"{name}: rows without and with hate", tuple(found[option] for option in OPTIONS), published)
