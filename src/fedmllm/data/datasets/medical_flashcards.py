"""Medical flashcards: text-only questions and answers; the text half of the benchmark's medical task.

T. Han et al., "MedAlpaca: An Open-Source Collection of Medical Conversational AI Models and Training Data", arXiv
2304.08247. The license is unclear: download the file from its authors.

One file, ``medical_meadow_wikidoc_medical_flashcards.json``, one split. A row as the file holds them (invented), and the sample
it becomes:

    {"instruction": "Answer this question truthfully", "input": "Which vitamin does the skin make in sunlight?",
     "output": "In sunlight the skin makes vitamin D."}
    Sample(id="medical_flashcards-00000", question="Answer the question.", answer="In sunlight the skin makes vitamin D.",
           content={"text": "Which vitamin does the skin make in sunlight?"}, category="flashcard", answer_type="open")

A share of the rows, chosen by the seed and the row's place in the file, is held out as the test split.
"""

from __future__ import annotations

from pydantic import Field

from fedmllm.data.datasets.base import Dataset, DatasetOptions, DatasetRequest, count_note, hold_out
from fedmllm.data.datasets.files import json_list, require
from fedmllm.data.datasets.rows import Row, Sieve
from fedmllm.types import Sample

FILE = "medical_meadow_wikidoc_medical_flashcards.json"
PUBLISHED = 33_955


class Options(DatasetOptions):
    """The share of the cards to hold out."""

    test_share: float = Field(0.1, gt=0, lt=1)
    """Share of the rows to hold out as the test split. The published file has a single split."""


def load(request: DatasetRequest) -> Dataset:
    """Load all cards and hold out a share as the test split. The score is exact-match accuracy.

    Raises:
        DataError: if the file is missing or rows are invalid; the message lists all of them.
    """
    root, options = request.folder("medical_flashcards"), request.options_as(Options)
    require(root, (FILE,), "the medical flashcards")
    sieve = Sieve(str(root / FILE), request.on_bad_sample)
    cards = sieve.samples(json_list(root / FILE), _sample)
    notes = (*sieve.finish(), count_note("cards", (len(cards),), (PUBLISHED,)))
    train, test = hold_out(cards, options.test_share, request.seed)
    return request.dataset("medical_flashcards", "accuracy", {"train": train, "test": test}, ("text",), notes)


def _sample(row: Row) -> Sample:
    index = row.where.rpartition("[")[2].rstrip("]")
    return Sample(
        id=f"medical_flashcards-{int(index):05d}",
        question="Answer the question.",
        answer=row.text("output"),
        content={"text": row.text("input")},
        category="flashcard",
        answer_type="open",
    )
