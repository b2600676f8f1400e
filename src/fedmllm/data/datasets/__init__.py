"""The index of datasets: one file each, found by the name in ``data.dataset``."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from fedmllm.data.datasets import digits
from fedmllm.data.datasets.base import Dataset, DatasetEntry, DatasetRequest
from fedmllm.errors import ConfigError


def _lazy(module: str) -> Callable[[DatasetRequest], Dataset]:
    """The ``load`` of a dataset file, imported when first called."""
    return lambda request: importlib.import_module(f"fedmllm.data.datasets.{module}").load(request)


__all__ = ["DATASETS", "Dataset", "DatasetRequest", "load_dataset"]


DATASETS: dict[str, DatasetEntry] = {
    "digits-claims": DatasetEntry("embedded: is a message about a picture misleading? 2 classes, AUC", digits.loader("digits-claims")),
    "digits-triage": DatasetEntry("embedded: which team should go? 8 unbalanced classes, macro-F1", digits.loader("digits-triage")),
    "digits-vqa": DatasetEntry("embedded: open and closed questions about a picture, accuracy", digits.loader("digits-vqa")),
    "digits-cards": DatasetEntry("embedded: questions in words, text only, accuracy", digits.loader("digits-cards")),
    "vqa_rad": DatasetEntry("VQA-RAD: questions about radiology images, accuracy", _lazy("vqa_rad"), needs_root=True),
}


def load_dataset(name: str, request: DatasetRequest) -> Dataset:
    """Load a dataset by name.

    Raises:
        ConfigError: if the folder is missing from the request or from the disk.
        DataError: if its files break the format's rules.
    """
    entry = DATASETS[name]
    if entry.needs_root and request.root is None:
        raise ConfigError(f"data.root: {name} reads files; give the folder that holds them, e.g. data.root=/path/to/{name}")
    if request.root is not None and not entry.needs_root:
        raise ConfigError(f"data.root: {name} is embedded in the package and reads no folder; leave data.root out")
    if request.root is not None and not request.root.is_dir():
        raise ConfigError(f"data.root: {str(request.root)!r} is not a folder; check the path")
    return entry.load(request)
