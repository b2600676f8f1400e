"""Several datasets in one federation: domain skew (each client another dataset) and task mix (some classify, others answer).

    data:
      dataset: mixture
      options: {parts: [{dataset: digits-vqa, num_train: 800}, {dataset: digits-cards, num_train: 800}]}
    federation: {partition: domain}          # each client one of them; or dirichlet: every client some of each

The benchmark's medical task is such a mixture: pictures with questions from VQA-RAD, texts from the flashcards. Under ``cross``
and ``hybrid`` a client then holds the one, the other or a share of both: ``data.holders`` divides each dataset among its holders.

A sample's ``domain`` is its dataset's name, its id and category begin with it. The headline score is that of the parts if they
share one, else ``mixed``: the mean over the parts of each one's own.
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
    """One dataset of the mixture; fields as in ``data``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dataset: str
    """A name of the index of datasets."""
    root: Path | None = None
    """Folder of its files."""
    num_train: int | None = Field(None, gt=0)
    """Training samples; left out for all there are."""
    num_test: int | None = Field(None, gt=0)
    """Test samples; left out for all there are."""
    num_validation: int | None = Field(None, gt=0)
    """Validation samples; left out for as many as there are, but no more than test samples."""
    validation_share: float | None = Field(None, ge=0, lt=1)
    """Share of the training samples held out where the dataset has no validation part; left out for ``data.validation_share``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The dataset's own settings."""

    def request(self, whole: DatasetRequest) -> DatasetRequest:
        """What this part's loader is asked for."""
        share = whole.validation_share if self.validation_share is None else self.validation_share
        found = replace(whole, root=self.root, options=self.options, validation_share=share)
        return replace(found, num_train=self.num_train, num_test=self.num_test, num_validation=self.num_validation)


class Options(DatasetOptions):
    """What to mix."""

    parts: tuple[MixedPart, ...] = Field(min_length=2)
    """Two or more datasets, each at most once."""


def load(request: DatasetRequest) -> Dataset:
    """The training and test samples of all parts.

    Raises:
        ConfigError: if a part is unknown, a mixture itself or named twice, or numbers of samples are set for the whole.
        DataError: as the parts' loaders do.
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

    problems = [f"{name!r} is no dataset that can be mixed" for name in names if name not in DATASETS or name == "mixture"]
    problems += [f"{name!r} is named {count} times" for name, count in Counter(names).items() if count > 1]
    if any(number is not None for number in (request.num_train, request.num_test, request.num_validation)):
        problems.append("give num_train, num_test and num_validation to the parts instead of the whole")
    if problems:
        raise ConfigError("data.options.parts: " + "; ".join(problems))


def _joined(parts: Iterable[tuple[str, Sequence[Sample]]]) -> tuple[Sample, ...]:
    """All samples under their dataset's name, in the order of their ids."""
    named = (
        replace(sample, id=f"{domain}/{sample.id}", domain=domain, category=f"{domain}/{sample.category}")
        for domain, samples in parts
        for sample in samples
    )
    return tuple(sorted(named, key=lambda sample: sample.id))
