"""What every dataset file returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from fedmllm.errors import DataError, listing
from fedmllm.types import Modality, Sample

Metric = Literal["auc", "macro_f1", "accuracy"]


@dataclass(frozen=True)
class Dataset:
    """Samples of one benchmark, split, with what is known about them.

    Attributes:
        name: as in the configuration.
        metric: the headline score, in [0, 1]: area under the ROC curve, macro-averaged F1 or exact-match accuracy.
        train, test: the samples, in an order that does not depend on the file system.
        modalities: what a complete sample holds.
        ceilings: for generated data, the best score any predictor can reach from ``both`` modalities or one alone.
        notes: what the reader of a report should know, e.g. rows left out and why.
    """

    name: str
    metric: Metric
    train: tuple[Sample, ...]
    test: tuple[Sample, ...]
    modalities: tuple[Modality, ...]
    ceilings: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [f"the {name} split is empty" for name in ("train", "test") if not getattr(self, name)]
        repeated = [f"id {key!r} occurs {n} times" for key, n in Counter(s.id for s in (*self.train, *self.test)).items() if n > 1]
        problems += repeated
        if problems:
            raise DataError(f"dataset {self.name}: every split needs samples and every sample an id of its own:\n{listing(problems)}")


@dataclass(frozen=True)
class DatasetRequest:
    """What a loader is asked for.

    Attributes:
        root: the folder that holds the files; None for embedded data.
        seed: for data that are generated or subsampled.
        num_train, num_test: how many samples; None for all there are (embedded data: the default number).
    """

    root: Path | None
    seed: int
    num_train: int | None = None
    num_test: int | None = None


class DatasetLoader(Protocol):
    """A dataset file's one public function."""

    def __call__(self, request: DatasetRequest) -> Dataset:
        """The dataset, or a ``DataError`` listing every row that breaks a rule."""
        ...


@dataclass(frozen=True)
class DatasetEntry:
    """A row of the index: one line of description, and where the loader is (imported only when used)."""

    summary: str
    load: Callable[[DatasetRequest], Dataset]
    needs_root: bool = False


def take(samples: Sequence[Sample], count: int | None, seed: int, split: str) -> tuple[Sample, ...]:
    """``count`` of the samples, drawn without replacement independently of their order; all of them for None.

    Raises:
        DataError: if there are fewer.
    """
    from fedmllm.randomness import generator

    ordered = sorted(samples, key=lambda sample: sample.id)
    if count is None:
        return tuple(ordered)
    if count > len(ordered):
        raise DataError(f"data.num_{split}: {count} samples asked for, there are {len(ordered)}; ask for fewer or leave it out")
    chosen = generator(seed, "subset", split).choice(len(ordered), size=count, replace=False)
    return tuple(ordered[i] for i in sorted(chosen))
