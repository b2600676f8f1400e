"""CrisisMMD v2.0, humanitarian task: which kind of information is in a tweet from a disaster? Eight unbalanced classes, macro-F1.

F. Alam, F. Ofli and M. Imran, "CrisisMMD: Multimodal Twitter Datasets from Natural Disasters", ICWSM 2018; splits: F. Ofli,
F. Alam and M. Imran, "Analysis of Social Media Data using Multimodal Deep Learning for Disaster Response", ISCRAM 2020.
CC BY-NC-SA 4.0 and terms of its own: download the files from their authors.

The download contains two variants:

    full      crisismmd_datasplit_all/task_humanitarian_text_img_{train,dev,test}.tsv; the label is the image's
    agreed    crisismmd_datasplit_agreed_label/task_humanitarian_text_img_agreed_lab_{train,dev,test}.tsv; only tweets whose
              text and image have the same label, with eight classes merged into five

A row as the files hold them (tab-separated, never quoted; invented), and the sample it becomes:

    california_wildfires  100000000000000001  100000000000000001_0  The fire has reached our road. https://t.co/x
        data_image/california_wildfires/10_10_2017/100000000000000001_0.jpg  other_relevant_information ...
    Sample(id="crisismmd-train-100000000000000001_0", question="Which kind of information is it?", answer="other relevant information",
           content={"image": root / "data_image/...", "text": "The fire has reached our road."}, ...)

Quotation marks are read literally; interpreting them would merge rows and change 25 of the 2,237 test rows. Web addresses are removed
from the text, and a tweet that contains nothing else has no text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from fedmllm.data.datasets.base import Dataset, DatasetOptions, DatasetRequest, Split, count_note
from fedmllm.data.datasets.files import require, table
from fedmllm.data.datasets.rows import Row, Sieve
from fedmllm.types import Sample

QUESTION = "Which kind of information is it?"
CLASSES = (
    "affected_individuals",
    "infrastructure_and_utility_damage",
    "injured_or_dead_people",
    "missing_or_found_people",
    "rescue_volunteering_or_donation_effort",
    "vehicle_damage",
    "other_relevant_information",
    "not_humanitarian",
)
MERGED = {
    "injured_or_dead_people": "affected_individuals",
    "missing_or_found_people": "affected_individuals",
    "vehicle_damage": "infrastructure_and_utility_damage",
}
FILES = {
    "full": "crisismmd_datasplit_all/task_humanitarian_text_img_{split}.tsv",
    "agreed": "crisismmd_datasplit_agreed_label/task_humanitarian_text_img_agreed_lab_{split}.tsv",
}
ROWS: Mapping[str, Mapping[str, int]] = {
    "full": {"train": 13608, "dev": 2237, "test": 2237},
    "agreed": {"train": 6126, "dev": 998, "test": 955},
}
LABELS: Mapping[str, tuple[int, ...]] = {"test": (88, 458, 10, 3, 256, 36, 331, 1055), "dev": (77, 405, 8, 2, 281, 38, 338, 1088)}
"""Numbers of rows by ``label_image`` in the full variant, in the order of ``CLASSES``."""


class Options(DatasetOptions):
    """The rows and labels to use."""

    variant: Literal["full", "agreed"] = "full"
    """``full`` uses all rows; ``agreed`` only rows whose text and image have the same label, with five classes."""
    label: Literal["label_image", "label_text", "label"] = "label_image"
    """Column of the label. The benchmark uses the label of the image."""
    test: Literal["test", "dev"] = "test"
    """File to evaluate on."""


def load(request: DatasetRequest) -> Dataset:
    """Load CrisisMMD. ``dev`` is the validation split unless it is the file to evaluate on. The score is macro-F1.

    Raises:
        DataError: if files are missing or rows are invalid; the message lists all of them.
    """
    root, options = request.folder("crisismmd"), request.options_as(Options)
    # Depending on where it is unpacked, the archive of the splits is next to the folder of images or inside it.
    images = root / "CrisisMMD_v2.0" if (root / "CrisisMMD_v2.0" / "data_image").is_dir() else root
    splits = next((base for base in (root, images) if (base / FILES[options.variant]).parent.is_dir()), root)
    parts: dict[Split, str] = {"train": "train", "test": options.test}
    if options.test == "test" and (splits / FILES[options.variant].format(split="dev")).is_file():
        parts["validation"] = "dev"
    names = {part: FILES[options.variant].format(split=part) for part in parts.values()}
    require(splits, tuple(names.values()), "CrisisMMD")
    require(images, ("data_image",), "CrisisMMD")
    sieve = Sieve(str(root), request.on_bad_sample)
    read = {
        split: sieve.samples(table(splits / names[part], "\t", quoted=False), partial(_sample, images, options, part))
        for split, part in parts.items()
    }
    notes = (f"{options.variant} variant, {options.label}, evaluated on {options.test}", *sieve.finish())
    notes += _count_notes({parts[split]: rows for split, rows in read.items()}, options)
    return request.dataset("crisismmd", "macro_f1", read, ("image", "text"), notes)


def _sample(images: Path, options: Options, split: str, row: Row) -> Sample:
    merged = MERGED if options.variant == "agreed" else {}
    named = {name: merged.get(name, name) for name in CLASSES}
    answer = _words(row.choice(options.label, named))
    image, text = row.file("image", images), _without_addresses(row.text("tweet_text"))
    return Sample(
        id=f"crisismmd-{split}-{row.text('image_id')}",
        question=QUESTION,
        answer=answer,
        options=tuple(_words(name) for name in CLASSES if name not in merged),
        category=answer,
        content={"image": image, "text": text} if text else {"image": image},
        client=row.text("event_name"),
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _without_addresses(text: str) -> str:
    return " ".join(re.sub(r"https?://\S+", " ", text).split())


def _count_notes(splits: Mapping[str, list[Sample]], options: Options) -> tuple[str, ...]:
    notes = [count_note(f"{split}: rows", (len(rows),), (ROWS[options.variant][split],)) for split, rows in splits.items()]
    if bare := sum("text" not in sample.content for rows in splits.values() for sample in rows):
        notes.append(f"{bare:,} tweet(s) contain only web addresses, so their text is missing")
    if options.variant == "full" and options.label == "label_image":
        found = Counter(sample.answer for sample in splits[options.test])
        notes.append(count_note(f"{options.test}: rows by class", tuple(found[_words(name)] for name in CLASSES), LABELS[options.test]))
    return tuple(notes)
