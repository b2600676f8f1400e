"""The index of datasets, by the names used in ``data.dataset``. Each dataset has its own file."""

from __future__ import annotations

import importlib
from typing import Any

from fedmllm.data.datasets import columns, digits, own
from fedmllm.data.datasets.base import Dataset, DatasetEntry, DatasetOptions, DatasetRequest
from fedmllm.errors import ConfigError
from fedmllm.registry import index


def _file(module: str, summary: str, needs_root: bool = True) -> DatasetEntry:
    """Return the index entry of a dataset file, which is imported on first use."""

    def found(name: str) -> Any:
        return getattr(importlib.import_module(f"fedmllm.data.datasets.{module}"), name, DatasetOptions)

    return DatasetEntry(summary, lambda request: found("load")(request), needs_root, lambda: found("Options"))


__all__ = ["DATASETS", "Dataset", "DatasetRequest", "load_dataset"]


DATASETS: dict[str, DatasetEntry] = index(
    "dataset",
    {
        "digits-claims": DatasetEntry("embedded: is a message about an image misleading? 2 classes, AUC", digits.loader("digits-claims")),
        "digits-triage": DatasetEntry("embedded: which team should go? 8 unbalanced classes, macro-F1", digits.loader("digits-triage")),
        "digits-vqa": DatasetEntry("embedded: open and closed questions about an image, accuracy", digits.loader("digits-vqa")),
        "digits-cards": DatasetEntry("embedded: text-only questions, accuracy", digits.loader("digits-cards")),
        "hateful_memes": _file("hateful_memes", "Hateful Memes: is a meme hateful? 2 classes, AUC"),
        "crisismmd": _file("crisismmd", "CrisisMMD: which kind of information is in a tweet from a disaster? 8 classes, macro-F1"),
        "vqa_rad": _file("vqa_rad", "VQA-RAD: questions about radiology images, accuracy"),
        "slake": _file("slake", "SLAKE: questions about radiology images, English or Chinese, accuracy"),
        "medical_flashcards": _file("medical_flashcards", "Medical flashcards: text-only questions, accuracy"),
        "nlvr": _file("nlvr", "NLVR: is a sentence about an image true? 2 classes, AUC"),
        "emojitwo": _file("emojitwo", "EmojiTwo: which kind of thing is an emoji? 8 classes, macro-F1"),
        "mixture": _file("mixture", "several datasets in one federation: domain skew and mixed tasks", needs_root=False),
        "jsonl": DatasetEntry(
            "your own JSON lines, with columns named in data.options", own.loader("jsonl"), True, lambda: columns.Options
        ),
        "csv": DatasetEntry(
            "your own CSV or TSV file, with columns named in data.options", own.loader("csv"), True, lambda: columns.Options
        ),
        "huggingface": DatasetEntry(
            "your own dataset saved by Hugging Face datasets", own.loader("huggingface"), True, lambda: columns.Options
        ),
    },
)


EMBEDDED = (*(name for name in DATASETS if name.startswith("digits-")), "mixture")
"""The package's datasets that need no folder."""


def load_dataset(name: str, request: DatasetRequest) -> Dataset:
    """Load a dataset by name.

    Raises:
        ConfigError: if the request names no folder where one is needed, or the folder does not exist.
        DataError: if the files are invalid.
    """
    entry = DATASETS[name]
    if entry.needs_root and request.root is None:
        raise ConfigError(f"data.root: {name} reads files; give the folder that holds them, e.g. data.root=/path/to/{name}")
    if request.root is not None and not entry.needs_root:
        embedded = "is embedded in the package and reads no folder; leave data.root out"
        own = "reads no folder according to its DatasetEntry; leave data.root out, or register it with needs_root=True"
        raise ConfigError(f"data.root: {name} {embedded if name in EMBEDDED else own}")
    if request.root is not None and not request.root.is_dir():
        raise ConfigError(f"data.root: {str(request.root)!r} is not a folder; check the path")
    return entry.load(request)
