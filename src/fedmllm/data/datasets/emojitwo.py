"""EmojiTwo: which kind of thing is an emoji? Eight unbalanced classes, macro-F1; a redistributable substitute for CrisisMMD.

Artwork by EmojiTwo (https://github.com/EmojiTwo/emojitwo) after Emojione 2.x (https://www.emojione.com), CC BY 4.0; names and
keywords MIT.

Files: ``emoji.json``, an object of entries by code, and ``png/128/CODE.png``. An entry, and the sample it becomes:

    "1f600": {"name": "grinning face", "category": "people", "keywords": ["happy", "smiley", "emotion"], ...}
    Sample(id="emojitwo-1f600", question="Which kind of thing is it?", answer="people", options=CLASSES,
           content={"image": root / "png/128/1f600.png", "text": "grinning face: happy, smiley, emotion"})

Left out are entries without an image, entries without a category or with the categories modifier and regional, which are pieces of
other emoji, and skin-tone variants. The published files have a single split; a share, drawn by the seed, is held out as the test split.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from pathlib import Path

from pydantic import Field

from fedmllm.data.datasets.base import Dataset, DatasetOptions, DatasetRequest, count_note, hold_out
from fedmllm.data.datasets.files import json_object, require
from fedmllm.data.datasets.rows import Row, RowError, Sieve, is_file, shown, words_of
from fedmllm.types import Sample

QUESTION = "Which kind of thing is it?"
CLASSES = ("symbols", "flags", "people", "objects", "nature", "travel", "food", "activity")
PUBLISHED = (291, 259, 226, 180, 160, 119, 85, 69)
"""Numbers of usable entries in the order of ``CLASSES``, at commit 311eff5."""

_LEFT_OUT = ("", "modifier", "regional")
_SKIN_TONE = re.compile("1f3f[b-f]")


class Options(DatasetOptions):
    """The share of the entries to hold out."""

    test_share: float = Field(0.25, gt=0, lt=1)
    """Share of the entries to hold out as the test split."""


def load(request: DatasetRequest) -> Dataset:
    """Load all usable entries and hold out a share as the test split. The score is macro-F1.

    Raises:
        DataError: if files are missing or entries are invalid; the message lists all of them.
    """
    root, options = request.folder("emojitwo"), request.options_as(Options)
    require(root, ("emoji.json", "png/128"), "EmojiTwo")
    sieve = Sieve(str(root), request.on_bad_sample)
    entries = list(json_object(root / "emoji.json", "code"))
    samples = sieve.samples(entries, partial(_sample, root))
    found, left_out = Counter(sample.answer for sample in samples), len(entries) - len(samples) - len(sieve.problems)
    notes = (
        *sieve.finish(),
        f"{left_out:,} of {len(entries):,} entries left out: no image, no usable category, or a skin-tone variant",
        count_note("entries by class", tuple(found[name] for name in CLASSES), PUBLISHED),
    )
    train, test = hold_out(samples, options.test_share, request.seed)
    return request.dataset("emojitwo", "macro_f1", {"train": train, "test": test}, ("image", "text"), notes)


def _sample(root: Path, row: Row) -> Sample | None:
    code = row.text("code")
    if not re.fullmatch("[0-9a-f]+(-[0-9a-f]+)*", code):
        raise RowError("an entry's name must be code points in hexadecimal digits, joined by dashes")
    answer = row.choice("category", dict.fromkeys(_LEFT_OUT) | {name: name for name in CLASSES})
    image = root / f"png/128/{code}.png"
    if answer is None or _SKIN_TONE.search(code) or not is_file(image):
        return None
    return Sample(
        id=f"emojitwo-{code}",
        question=QUESTION,
        answer=answer,
        options=CLASSES,
        category=answer,
        content={"image": image, "text": _text(row)},
    )


def _text(row: Row) -> str:
    name, keywords = row.text("name"), row.record.get("keywords", [])
    if not isinstance(keywords, list) or not all(map(words_of, keywords)):
        raise RowError(f"keywords must be a list of words, got {shown(keywords)}")
    return f"{name}: {', '.join(map(words_of, keywords))}" if keywords else name
