"""Combines several datasets in one federation, for domain skew (each client has one dataset) and mixed tasks.

    data:
      dataset: mixture
      options: {parts: [{dataset: digits-vqa, num_train: 800}, {dataset: digits-cards, num_train: 800}]}
    federation: {partition: domain}          # one dataset per client; dirichlet gives every client some of each

The benchmark's medical task is such a mixture: images with questions from VQA-RAD, and texts from the flashcards. In the scenarios
``cross`` and ``hybrid``, ``data.holders`` divides each dataset among the clients that can hold it.

A sample's ``domain`` is its dataset's name, and its id and category begin with that name. The headline score is the datasets' common
one. If they have different scores, it is ``mixed``, the mean over the datasets of each one's own score.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fedmllm.data.datasets.base import Dataset, DatasetOptions, DatasetRequest
from fedmllm.errors import ConfigError
from fedmllm.types import Sample


class MixedPart(BaseModel):
    """One dataset of a mixture. The fields are those of ``data``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dataset: str
    """Name of the dataset."""
    root: Path | None = None
    """Folder of the dataset's files; null for embedded datasets."""
    num_train: int | None = Field(None, gt=0)
    """Number of training samples; null for all available."""
    num_test: int | None = Field(None, gt=0)
    """Number of test samples; null for all available."""
    num_validation: int | None = Field(None, gt=0)
    """Number of validation samples; null for all available, but at most as many as test samples."""
    validation_share: float | None = Field(None, ge=0, lt=1)
    """Share of the training samples to hold out if the dataset has no validation split; null uses ``data.validation_share``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings specific to the dataset."""

    def request(self, whole: DatasetRequest) -> DatasetRequest:
        """Return the arguments of this dataset's loader, given those of the mixture."""
        share = whole.validation_share if self.validation_share is None else self.validation_share
        found = replace(whole, root=self.root, options=self.options, validation_share=share)
        return replace(found, num_train=self.num_train, num_test=self.num_test, num_validation=self.num_validation)


class Options(DatasetOptions):
    """The datasets to mix."""

    parts: tuple[MixedPart, ...] = Field(min_length=2)
    """Two or more different datasets."""


def load(request: DatasetRequest) -> Dataset:
    """Return the samples of all datasets of the mixture.

    Raises:
        ConfigError: if a dataset is unknown, a mixture itself or listed twice, or numbers of samples are set for the whole mixture.
        DataError: if a dataset's files are invalid.
    """
    from fedmllm.data.datasets import load_dataset

    parts = request.options_as(Options).parts
    _check(request, [part.dataset for part in parts])
    loaded = [load_dataset(part.dataset, part.request(request)) for part in parts]
    metrics = {dataset.metric for dataset in loaded}
    return Dataset(
        "mixture",
        metrics.pop() if len(metrics) == 1 else "mixed",
        _joined((dataset.name, dataset.train) for dataset in loaded),
        _joined((dataset.name, dataset.test) for dataset in loaded),
        tuple(sorted({modality for dataset in loaded for modality in dataset.modalities})),
        notes=tuple(f"{dataset.name}: {note}" for dataset in loaded for note in dataset.notes),
        validation=_joined((dataset.name, dataset.validation) for dataset in loaded),
    )


def _check(request: DatasetRequest, names: list[str]) -> None:
    from fedmllm.data.datasets import DATASETS

    problems = [f"{name!r} is not a dataset that can be mixed" for name in names if name not in DATASETS or name == "mixture"]
    problems += [f"{name!r} is listed {count} times" for name, count in Counter(names).items() if count > 1]
    if any(number is not None for number in (request.num_train, request.num_test, request.num_validation)):
        problems.append("set num_train, num_test and num_validation for each part instead of the mixture")
    if problems:
        raise ConfigError("data.options.parts: " + "; ".join(problems))


def _joined(parts: Iterable[tuple[str, Sequence[Sample]]]) -> tuple[Sample, ...]:
    """Return the samples of all datasets, with the dataset's name in id, domain and category, in the order of their ids."""
    named = (
        replace(sample, id=f"{domain}/{sample.id}", domain=domain, category=f"{domain}/{sample.category}")
        for domain, samples in parts
        for sample in samples
    )
    return tuple(sorted(named, key=lambda sample: sample.id))
