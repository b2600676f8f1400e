"""What every dataset file returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmllm.data.datasets.rows import OnBadSample
from fedmllm.errors import ConfigError, DataError, listing
from fedmllm.explain import rule
from fedmllm.randomness import generator
from fedmllm.types import Modality, Sample

Metric = Literal["auc", "macro_f1", "accuracy", "mixed"]


@dataclass(frozen=True)
class Dataset:
    """Samples of one benchmark, split, with what is known about them.

    Attributes:
        name: as in the configuration.
        metric: the headline score, in [0, 1]: area under the ROC curve, macro-averaged F1, exact-match accuracy, or
            the mean of these over the datasets of a mixture.
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

    @property
    def mixed(self) -> bool:
        """Whether it is several datasets in one."""
        return self.name == "mixture"


class DatasetOptions(BaseModel):
    """What can be chosen about one dataset; a dataset file's ``Options`` adds its own fields. None by default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Options = TypeVar("Options", bound=DatasetOptions)


@dataclass(frozen=True)
class DatasetRequest:
    """What a loader is asked for.

    Attributes:
        root: the folder that holds the files; None for embedded data.
        seed: for data that are generated or subsampled.
        num_train, num_test: how many samples; None for all there are (embedded data: the default number).
        on_bad_sample: whether bad rows are refused, all in one error, or skipped and counted in the notes.
        options: the dataset's own settings, as ``data.options`` holds them.
    """

    root: Path | None
    seed: int
    num_train: int | None = None
    num_test: int | None = None
    on_bad_sample: OnBadSample = "refuse"
    options: Mapping[str, Any] = field(default_factory=dict)

    def folder(self, dataset: str) -> Path:
        """The folder of files.

        Raises:
            ConfigError: if none is named.
        """
        if self.root is None:
            raise ConfigError(f"data.root: {dataset} reads files; give the folder that holds them, e.g. data.root=/path/to/{dataset}")
        return self.root

    def options_as(self, form: type[Options]) -> Options:
        """The dataset's own settings, checked.

        Raises:
            ConfigError: naming each field that is unknown or out of range.
        """
        return check_options(form, self.options)

    def take(self, train: Sequence[Sample], test: Sequence[Sample]) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
        """As many samples of both splits as are asked for.

        Raises:
            DataError: if there are fewer.
        """
        return _take(train, self.num_train, self.seed, "train"), _take(test, self.num_test, self.seed, "test")


def check_options(form: type[Options], values: Mapping[str, Any]) -> Options:
    """The dataset's own settings.

    Raises:
        ConfigError: naming each field that is unknown or out of range.
    """
    try:
        return form.model_validate(dict(values))
    except ValidationError as error:
        known = list(form.model_fields)
        problems = [f"{'.'.join(('data.options', *map(str, e['loc'])))}: {rule(e, known)}" for e in error.errors()]
        raise ConfigError(
            f"data.options does not suit the dataset, whose settings are {', '.join(known) or 'none'}:\n{listing(problems)}"
        ) from error


class DatasetLoader(Protocol):
    """A dataset file's one public function."""

    def __call__(self, request: DatasetRequest) -> Dataset:
        """The dataset, or a ``DataError`` listing every row that breaks a rule."""
        ...


@dataclass(frozen=True)
class DatasetEntry:
    """A row of the index: one line of description, the loader, and the form of ``data.options`` (each imported when used)."""

    summary: str
    load: Callable[[DatasetRequest], Dataset]
    needs_root: bool = False
    options: Callable[[], type[DatasetOptions]] = lambda: DatasetOptions


def _take(samples: Sequence[Sample], count: int | None, seed: int, split: str) -> tuple[Sample, ...]:
    """``count`` of the samples, drawn without replacement independently of their order; all of them for None.

    Raises:
        DataError: if there are fewer.
    """
    ordered = sorted(samples, key=lambda sample: sample.id)
    if count is None:
        return tuple(ordered)
    if count > len(ordered):
        raise DataError(f"data.num_{split}: {count} samples asked for, there are {len(ordered)}; ask for fewer or leave it out")
    chosen = generator(seed, "subset", split).choice(len(ordered), size=count, replace=False)
    return tuple(ordered[i] for i in sorted(chosen))


def hold_out(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, test) samples where the files have one split; independent of the order of the samples.

    Each category gives the test split its share, rounded so that the whole has its own (largest remainders, ties by lot); of a single one all are
    drawn alike.

    Raises:
        ConfigError: if the share is not in (0, 1).
    """
    if not 0 < share < 1:
        raise ConfigError(f"data.options.test_share: {share} samples' share cannot be held out; it must lie above 0 and below 1")
    ordered = sorted(samples, key=lambda sample: sample.id)
    shuffled = [ordered[i] for i in generator(seed, "hold-out").permutation(len(ordered))]
    wanted = _stratified(Counter(sample.category for sample in shuffled), share)
    train, test = list[Sample](), list[Sample]()
    for sample in shuffled:
        held = wanted[sample.category] > 0
        wanted[sample.category] -= held
        (test if held else train).append(sample)
    return train, test


def _stratified(counts: Counter[str], share: float) -> Counter[str]:
    """How many of each category make up the share of all."""
    wanted = Counter({name: int(share * count) for name, count in counts.items()})
    missing = round(share * counts.total()) - wanted.total()
    # Of equal remainders, what was drawn first: else a split would favor the same names under every seed.
    by_remainder = sorted(counts, key=lambda name: wanted[name] - share * counts[name])
    wanted.update(by_remainder[: max(missing, 0)])
    return wanted


def count_note(what: str, found: tuple[int, ...], published: tuple[int, ...] | None) -> str:
    """How many were found, and whether that is what was published."""
    numbers = " / ".join(f"{count:,}" for count in found)
    if published is None:
        return f"{what}: {numbers}"
    return f"{what}: {numbers}, " + ("as published" if found == published else f"published are {' / '.join(f'{n:,}' for n in published)}")
