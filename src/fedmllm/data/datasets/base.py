"""What every dataset file returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

VALIDATION_SHARE = 0.1
"""Of the training samples, held out where the data have no validation part of their own."""


@dataclass(frozen=True)
class Dataset:
    """Samples of one benchmark, split, with what is known about them.

    Attributes:
        name: as in the configuration.
        metric: the headline score, in [0, 1]: area under the ROC curve, macro-averaged F1, exact-match accuracy, or
            the mean of these over the datasets of a mixture.
        train, test: the samples, in an order that does not depend on the file system.
        validation: what a model in training is scored on, and what anything is chosen by; may be empty.
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
    validation: tuple[Sample, ...] = ()

    def __post_init__(self) -> None:
        problems = [f"the {name} split is empty" for name in ("train", "test") if not getattr(self, name)]
        repeated = [f"id {key!r} occurs {n} times" for key, n in Counter(sample.id for sample in self.samples).items() if n > 1]
        problems += repeated
        if problems:
            raise DataError(f"dataset {self.name}: every split needs samples and every sample an id of its own:\n{listing(problems)}")

    @property
    def samples(self) -> tuple[Sample, ...]:
        """Of all splits."""
        return (*self.train, *self.validation, *self.test)

    @property
    def mixed(self) -> bool:
        """Whether it is several datasets in one."""
        return self.name == "mixture"


class DatasetOptions(BaseModel):
    """What can be chosen about one dataset; a dataset file's ``Options`` adds its own fields. None by default."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Options = TypeVar("Options", bound=DatasetOptions)


def picture_or_text(sample: Sample) -> object:
    """What samples that must not be torn apart have in common unless a dataset knows better: their picture or, without one, their text."""
    pictures = [value for name, value in sorted(sample.content.items()) if name != "text" and isinstance(value, (Path, bytes))]
    return tuple(pictures) or sample.content.get("text") or sample.id


@dataclass(frozen=True)
class DatasetRequest:
    """What a loader is asked for.

    Attributes:
        root: the folder that holds the files; None for embedded data.
        seed: for data that are generated or subsampled.
        num_train, num_test: how many samples; None for all there are (embedded data: the default number).
        num_validation: the same of the validation part; None for all there are, but no more than test samples.
        validation_share: how much of the training samples becomes the validation part where the data have none of their own, in [0, 1).
        on_bad_sample: whether bad rows are refused, all in one error, or skipped and counted in the notes.
        options: the dataset's own settings, as ``data.options`` holds them.
    """

    root: Path | None
    seed: int
    num_train: int | None = None
    num_test: int | None = None
    on_bad_sample: OnBadSample = "refuse"
    options: Mapping[str, Any] = field(default_factory=dict)
    num_validation: int | None = None
    validation_share: float = VALIDATION_SHARE

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

    def dataset(
        self,
        name: str,
        metric: Metric,
        splits: Mapping[Split, Sequence[Sample]],
        modalities: tuple[Modality, ...],
        notes: Iterable[str] = (),
        together: Callable[[Sample], object] = picture_or_text,
    ) -> Dataset:
        """A dataset of as many samples of each split as are asked for.

        Args:
            name: as in ``Dataset``, like the three that follow.
            metric: its score.
            modalities: of a complete sample.
            notes: on what was read.
            splits: all samples of ``train`` and ``test``, and of ``validation`` if the data have such a part. Else a share of the training samples
                is held out, before ``num_train`` of the rest are taken.
            together: what samples have in common that are held out all or none, such as a picture.

        Raises:
            DataError: if there are fewer samples than asked for.
        """
        train, found, told = splits["train"], splits.get("validation", ()), [*notes]
        if not found and self.validation_share:
            rest, held = hold_out_groups(train, self.validation_share, self.seed, together)
            train, found, note = (rest, held, _HELD_OUT) if len(held) >= _LEAST_VALIDATION else (train, (), _NOT_HELD_OUT)
            told.append(note.format(held=len(held), of=len(splits["train"]), least=_LEAST_VALIDATION))
        besides = f" and {gone} held out for validation (data.validation_share)" if (gone := len(splits["train"]) - len(train)) else ""
        chosen, test = _take(train, self.num_train, self.seed, "train", besides), _take(splits["test"], self.num_test, self.seed, "test")
        count = min(len(found), len(test)) if self.num_validation is None else self.num_validation
        return Dataset(name, metric, chosen, test, modalities, notes=tuple(told), validation=_take(found, count, self.seed, "validation"))


_LEAST_VALIDATION = 10
"""Samples; a score of fewer tells nothing that could be chosen by."""
_HELD_OUT = "validation: {held:,} of {of:,} training samples are held out (data.validation_share)"
_NOT_HELD_OUT = "validation: none; of {of:,} training samples {held:,} would be held out, too few to choose by (at least {least}: data.validation_share)"


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


def _take(samples: Sequence[Sample], count: int | None, seed: int, split: Split, besides: str = "") -> tuple[Sample, ...]:
    """``count`` of the samples, drawn without replacement independently of their order; all of them for None.

    Raises:
        DataError: if there are fewer.
    """
    ordered = sorted(samples, key=lambda sample: sample.id)
    if count is None:
        return tuple(ordered)
    if count > len(ordered):
        raise DataError(f"data.num_{split}: {count} samples asked for, there are {len(ordered)}{besides}; ask for fewer or leave it out")
    chosen = generator(seed, "subset", split).choice(len(ordered), size=count, replace=False)
    return tuple(ordered[i] for i in sorted(chosen))


def hold_out_groups(
    samples: Sequence[Sample], share: float, seed: int, together: Callable[[Sample], object]
) -> tuple[list[Sample], list[Sample]]:
    """(training, validation) samples: a share of the groups of samples that stay together, stratified by the category of each one's first."""
    groups: dict[object, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.id):
        groups.setdefault(together(sample), []).append(sample)
    _, chosen = hold_out([group[0] for group in groups.values()], share, seed, "validation")
    held = {sample.id for first in chosen for sample in groups[together(first)]}
    return [s for s in samples if s.id not in held], [s for s in samples if s.id in held]


def hold_out(samples: Sequence[Sample], share: float, seed: int, purpose: str = "hold-out") -> tuple[list[Sample], list[Sample]]:
    """(training, held out) samples where the files have one split; independent of the order of the samples.

    Each category gives the held-out part its share, rounded so that the whole has its own (largest remainders, ties by lot); of a single one all are
    drawn alike.

    Raises:
        ConfigError: if the share is not in (0, 1).
    """
    if not 0 < share < 1:
        raise ConfigError(f"data.options.test_share: {share} samples' share cannot be held out; it must lie above 0 and below 1")
    ordered = sorted(samples, key=lambda sample: sample.id)
    shuffled = [ordered[i] for i in generator(seed, purpose).permutation(len(ordered))]
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
