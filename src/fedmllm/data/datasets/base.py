"""The types that dataset files use and return, and helpers for splits."""

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
from fedmllm.registry import index
from fedmllm.types import Modality, Prediction, Sample

BUILT_IN = ("auc", "macro_f1", "accuracy", "mixed")
HEADLINES: dict[str, Callable[[Prediction], float] | None] = index("headline", dict.fromkeys(BUILT_IN))
"""The headline scores: None for those of the package; for a plugin's, a function that scores one prediction in [0, 1]."""
Split = Literal["train", "validation", "test"]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")

VALIDATION_SHARE = 0.1
"""Default share of the training samples that is held out if a dataset has no validation split."""


@dataclass(frozen=True)
class Dataset:
    """A dataset's samples by split, and facts about them.

    Attributes:
        name: the name in the configuration.
        metric: the headline score, in [0, 1]: area under the ROC curve (``auc``), macro-averaged F1 (``macro_f1``), exact-match ``accuracy``,
            the mean of these over the datasets of a mixture (``mixed``), or a plugin's.
        train, test: the samples, in an order that does not depend on the file system.
        validation: the samples used to score models during training and to choose anything; may be empty.
        modalities: the modalities of a complete sample.
        ceilings: for generated data, the best score that any predictor can reach from ``both`` modalities or from one alone.
        notes: remarks for the report, e.g. which rows were left out and why.
    """

    name: str
    metric: str
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
            raise DataError(f"dataset {self.name}: every split needs samples and every sample a unique id:\n{listing(problems)}")

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The samples of all splits."""
        return (*self.train, *self.validation, *self.test)

    @property
    def mixed(self) -> bool:
        """Whether the dataset is a mixture of several datasets."""
        return self.name == "mixture"


class DatasetOptions(BaseModel):
    """Base class of ``data.options``. It has no fields; a dataset file's ``Options`` adds the dataset's own settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Options = TypeVar("Options", bound=DatasetOptions)


def picture_or_text(sample: Sample) -> object:
    """Return the default key of samples that must stay in the same split: their image, or their text if they have no image."""
    pictures = [value for name, value in sorted(sample.content.items()) if name != "text" and isinstance(value, (Path, bytes))]
    return tuple(pictures) or sample.content.get("text") or sample.id


@dataclass(frozen=True)
class DatasetRequest:
    """The arguments of a dataset loader.

    Attributes:
        root: the folder of the dataset's files; None for embedded data.
        seed: the seed for generating or subsampling data.
        num_train, num_test: numbers of samples; None for all available (for embedded data: the default number).
        num_validation: number of validation samples; None for all available, but at most as many as test samples.
        validation_share: share of the training samples to hold out if the dataset has no validation split, in [0, 1).
        on_bad_sample: whether bad rows are rejected in one error, or skipped and counted in the notes.
        options: the dataset's own settings from ``data.options``.
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
        """Return the folder of the dataset's files.

        Raises:
            ConfigError: if no folder is given.
        """
        if self.root is None:
            raise ConfigError(f"data.root: {dataset} reads files; give the folder that holds them, e.g. data.root=/path/to/{dataset}")
        return self.root

    def options_as(self, form: type[Options]) -> Options:
        """Return the validated settings of the dataset.

        Raises:
            ConfigError: if fields are unknown or invalid; the message names each.
        """
        return check_options(form, self.options)

    def dataset(
        self,
        name: str,
        metric: str,
        splits: Mapping[Split, Sequence[Sample]],
        modalities: tuple[Modality, ...],
        notes: Iterable[str] = (),
        together: Callable[[Sample], object] = picture_or_text,
    ) -> Dataset:
        """Return a dataset with the requested number of samples in each split.

        Args:
            name: the name in the configuration.
            metric: the headline score.
            splits: all samples of ``train`` and ``test``, and of ``validation`` if the dataset has one. If not, a share of the training
                samples is held out before ``num_train`` of the rest are drawn.
            modalities: the modalities of a complete sample.
            notes: remarks for the report.
            together: returns a key such as the image. Samples with the same key stay in the same split when a share is held out.

        Raises:
            DataError: if a split has fewer samples than requested.
        """
        train, found, remarks = splits["train"], splits.get("validation", ()), [*notes]
        if not found and self.validation_share:
            rest, held = hold_out_groups(train, self.validation_share, self.seed, together)
            train, found, note = (rest, held, _HELD_OUT) if len(held) >= _LEAST_VALIDATION else (train, (), _NOT_HELD_OUT)
            remarks.append(note.format(held=len(held), of=len(splits["train"]), least=_LEAST_VALIDATION))
        besides = f" and {gone} held out for validation (data.validation_share)" if (gone := len(splits["train"]) - len(train)) else ""
        chosen, test = _take(train, self.num_train, self.seed, "train", besides), _take(splits["test"], self.num_test, self.seed, "test")
        count = min(len(found), len(test)) if self.num_validation is None else self.num_validation
        return Dataset(
            name, metric, chosen, test, modalities, notes=tuple(remarks), validation=_take(found, count, self.seed, "validation")
        )


_LEAST_VALIDATION = 10
"""Minimum number of held-out validation samples. A score on fewer is too noisy to choose anything by."""
_HELD_OUT = "validation: {held:,} of {of:,} training samples are held out (data.validation_share)"
_NOT_HELD_OUT = "validation: none; holding out {held:,} of {of:,} training samples would be too few, at least {least} are needed (data.validation_share)"


def check_options(form: type[Options], values: Mapping[str, Any]) -> Options:
    """Return the validated settings of a dataset.

    Raises:
        ConfigError: if fields are unknown or invalid; the message names each.
    """
    try:
        return form.model_validate(dict(values))
    except ValidationError as error:
        known = list(form.model_fields)
        problems = [f"{'.'.join(('data.options', *map(str, e['loc'])))}: {rule(e, known)}" for e in error.errors()]
        raise ConfigError(
            f"data.options does not fit the dataset, whose settings are {', '.join(known) or 'none'}:\n{listing(problems)}"
        ) from error


class DatasetLoader(Protocol):
    """The type of a dataset file's loader."""

    def __call__(self, request: DatasetRequest) -> Dataset:
        """Return the dataset, or raise a ``DataError`` that lists every bad row."""
        ...


@dataclass(frozen=True)
class DatasetEntry:
    """A dataset in the index: a one-line description, the loader, whether it needs ``data.root``, and the class of ``data.options``.

    Loader and class are imported on first use.
    """

    summary: str
    load: Callable[[DatasetRequest], Dataset]
    needs_root: bool = False
    options: Callable[[], type[DatasetOptions]] = lambda: DatasetOptions


def _take(samples: Sequence[Sample], count: int | None, seed: int, split: Split, besides: str = "") -> tuple[Sample, ...]:
    """Draw ``count`` samples without replacement, independently of their order, or return all of them if ``count`` is None.

    Raises:
        DataError: if there are fewer.
    """
    ordered = sorted(samples, key=lambda sample: sample.id)
    if count is None:
        return tuple(ordered)
    if count > len(ordered):
        raise DataError(f"data.num_{split}: {count} samples requested, but there are {len(ordered)}{besides}; lower it or leave it out")
    chosen = generator(seed, "subset", split).choice(len(ordered), size=count, replace=False)
    return tuple(ordered[i] for i in sorted(chosen))


def hold_out_groups(
    samples: Sequence[Sample], share: float, seed: int, together: Callable[[Sample], object]
) -> tuple[list[Sample], list[Sample]]:
    """Return (training, validation) samples. A share of the groups of samples with the same key is held out.

    Groups are stratified by the category of their first sample.
    """
    groups: dict[object, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.id):
        groups.setdefault(together(sample), []).append(sample)
    _, chosen = hold_out([group[0] for group in groups.values()], share, seed, "validation")
    held = {sample.id for first in chosen for sample in groups[together(first)]}
    return [s for s in samples if s.id not in held], [s for s in samples if s.id in held]


def hold_out(samples: Sequence[Sample], share: float, seed: int, purpose: str = "hold-out") -> tuple[list[Sample], list[Sample]]:
    """Return (training, held-out) samples of a single split. The result does not depend on the order of the samples.

    The held-out samples are stratified by category. Numbers per category are rounded so that the total is right (largest remainders, ties
    broken at random).

    Raises:
        ConfigError: if the share is not in (0, 1).
    """
    if not 0 < share < 1:
        raise ConfigError(f"data.options.test_share: must be greater than 0 and less than 1, got {share}")
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
    """Return how many samples of each category to hold out."""
    wanted = Counter({name: int(share * count) for name, count in counts.items()})
    missing = round(share * counts.total()) - wanted.total()
    # Equal remainders keep the shuffled order. Otherwise the same category names would be favored under every seed.
    by_remainder = sorted(counts, key=lambda name: wanted[name] - share * counts[name])
    wanted.update(by_remainder[: max(missing, 0)])
    return wanted


def count_note(what: str, found: tuple[int, ...], published: tuple[int, ...] | None) -> str:
    """Return a note with the numbers found, and whether they match the published ones."""
    numbers = " / ".join(f"{count:,}" for count in found)
    if published is None:
        return f"{what}: {numbers}"
    return f"{what}: {numbers}, " + ("as published" if found == published else f"published: {' / '.join(f'{n:,}' for n in published)}")
