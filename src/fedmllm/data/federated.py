"""Clients with their samples, and the manifest that makes a split checkable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedmllm.data import reference
from fedmllm.data.datasets import DATASETS, Dataset, DatasetRequest, load_dataset
from fedmllm.data.datasets.base import check_options
from fedmllm.data.datasets.rows import OnBadSample, skipped
from fedmllm.data.images import broken_images
from fedmllm.data.modalities import Protocol, apply_scenario, parse_scenario
from fedmllm.data.partition import Indices, by_domain, dirichlet, iid, natural, quantity
from fedmllm.data.prompts import PromptStyle
from fedmllm.data.quality import parse_part
from fedmllm.errors import ConfigError, DataError, listing
from fedmllm.randomness import generator
from fedmllm.types import Record, Sample

DEFAULT_ALPHA = 0.5


class DataConfig(BaseModel):
    """Which samples, and how they are worded."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = "digits-claims"
    """A name of the index of datasets."""
    root: Path | None = None
    """Folder of the dataset's files; left out for embedded data. Relative paths start at the working directory."""
    prompt: PromptStyle = "agnostic"
    """``agnostic`` words all samples alike; ``specific`` names the modalities each one holds."""
    num_train: int | None = Field(None, gt=0)
    """Training samples over all clients; left out for all there are."""
    num_test: int | None = Field(None, gt=0)
    """Test samples; left out for all there are."""
    check_images: bool = True
    """Decode every image file once before the run begins; what is done about broken ones ``on_bad_sample`` says."""
    on_bad_sample: OnBadSample = "refuse"
    """``refuse``: one error lists all bad rows. ``skip``: they are left out, counted and listed in the report."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The dataset's own settings; the datasets page lists them."""

    @field_validator("root")
    @classmethod
    def _home(cls, root: Path | None) -> Path | None:
        return root.expanduser() if root else None

    @field_validator("dataset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(f"{name!r} is no dataset; known: {', '.join(DATASETS)}")
        return name

    @model_validator(mode="after")
    def _suited(self) -> DataConfig:
        try:
            check_options(DATASETS[self.dataset].options(), self.options)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class FederationConfig(BaseModel):
    """Who takes part, how the data are spread and how long it lasts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_clients: int = Field(10, gt=0)
    """Clients in the federation."""
    clients_per_round: int = Field(2, gt=0)
    """Clients sampled for each round, without replacement."""
    num_rounds: int = Field(25, gt=0)
    """Communication rounds."""
    scenario: str = "aligned"
    """``aligned``, ``missing-RATE``, ``cross-IMAGE:TEXT`` or ``hybrid-PROBABILITY``."""
    partition: Literal["dirichlet", "iid", "quantity", "natural", "domain"] = "dirichlet"
    """Skew over labels (``dirichlet``) or sizes (``quantity``), none (``iid``), the data's own clients, or a dataset of a mixture each."""
    dirichlet_alpha: float | None = Field(None, gt=0)
    """Concentration of the skew over labels (or sizes); left out for the scenario's own (``aligned-ALPHA``) or 0.5."""
    protocol: Protocol = "clean"
    """``clean``: independent of file order, seeded by purpose. ``reference``: the published reference code's splits."""
    heterogeneity: tuple[str, ...] = ()
    """What else is wrong with the training samples, e.g. ``[blur-0.3, typos-0.2@client]``; applied before the scenario."""
    keep_empty: bool = False
    """Keep samples that lost every modality, as the reference code does; else they are left out and counted."""
    min_partition_size: int = Field(8, gt=0)
    """Samples every client has before a scenario takes modalities away."""

    @field_validator("scenario")
    @classmethod
    def _parses(cls, text: str) -> str:
        try:
            parse_scenario(text)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return text

    @field_validator("heterogeneity")
    @classmethod
    def _known_parts(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for part in parts:
                parse_part(part)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return parts

    @model_validator(mode="after")
    def _consistent(self) -> FederationConfig:
        if self.clients_per_round > self.num_clients:
            raise ValueError(
                f"clients_per_round: a round samples {self.clients_per_round} clients, but num_clients is {self.num_clients}; lower the first"
            )
        name, level = parse_scenario(self.scenario)
        fixed = float(level) if name == "aligned" and level else None
        if fixed is not None and self.dirichlet_alpha not in (None, fixed):
            raise ValueError(f"dirichlet_alpha: {self.dirichlet_alpha} contradicts scenario {self.scenario}; keep one of them")
        if self.partition in ("iid", "natural") and (self.dirichlet_alpha is not None or fixed is not None):
            raise ValueError(f"dirichlet_alpha: {self.partition} has no skew to set; leave alpha out or use partition dirichlet")
        if self.protocol == "reference" and self.partition != "dirichlet":
            raise ValueError("protocol: the reference code knows partition dirichlet only; use it, or protocol clean")
        return self

    @property
    def alpha(self) -> float:
        """The label skew in force."""
        name, level = parse_scenario(self.scenario)
        if name == "aligned" and level:
            return float(level)
        return DEFAULT_ALPHA if self.dirichlet_alpha is None else self.dirichlet_alpha


@dataclass(frozen=True)
class FederatedData:
    """A dataset spread over clients.

    Attributes:
        dataset: where the samples come from; its test split is complete and shared by all.
        clients: training samples by client id.
        dropped: samples that lost every modality and were left out.
    """

    dataset: Dataset
    clients: Mapping[str, tuple[Sample, ...]]
    dropped: int


def federate(data: DataConfig, federation: FederationConfig, seed: int) -> FederatedData:
    """Load a dataset, spread it over clients and take away what the scenario says.

    Raises:
        ConfigError, DataError: if settings and data do not fit each other, or a client is left without samples.
    """
    dataset = load(data, seed)
    names, parts = _partition(dataset, federation, seed)
    complete = {name: [dataset.train[j] for j in part] for name, part in zip(names, parts, strict=True)}
    altered = complete
    for alter in map(parse_part, federation.heterogeneity):
        altered = {name: alter(name, samples, seed) for name, samples in altered.items()}
    clients, dropped = apply_scenario(
        federation.scenario, altered, dataset.modalities, seed, protocol=federation.protocol, keep_empty=federation.keep_empty
    )
    _refuse_empty(clients, complete, federation.scenario)
    return FederatedData(dataset, clients, dropped)


def load(data: DataConfig, seed: int) -> Dataset:
    """The samples before they are spread.

    Raises:
        ConfigError, DataError: if settings are wrong, or rows or pictures are bad.
    """
    request = DatasetRequest(data.root, seed, data.num_train, data.num_test, data.on_bad_sample, data.options)
    dataset = load_dataset(data.dataset, request)
    return _with_sound_images(dataset, data.on_bad_sample) if data.check_images else dataset


def _with_sound_images(dataset: Dataset, policy: OnBadSample) -> Dataset:
    """The dataset, every picture of which decodes.

    Raises:
        DataError: listing all pictures that do not, if the policy is to refuse.
    """
    broken = broken_images(_pictures((*dataset.train, *dataset.test)))
    if broken and policy == "refuse":
        raise DataError(
            f"{len(broken)} image(s) cannot be used; replace them, or set data.on_bad_sample to skip:\n{listing(broken.values())}"
        )
    if not broken:
        return dataset

    def sound(samples: Sequence[Sample]) -> tuple[Sample, ...]:
        return tuple(sample for sample in samples if not set(_pictures((sample,))) & set(broken))

    train, test = sound(dataset.train), sound(dataset.test)
    count = len(dataset.train) + len(dataset.test) - len(train) - len(test)
    notes = skipped(f"{count:,} sample(s) skipped for {len(broken):,} image(s) that cannot be used", list(broken.values()))
    return replace(dataset, train=train, test=test, notes=(*dataset.notes, *notes))


def _pictures(samples: Iterable[Sample]) -> Iterator[Path]:
    return (s.content["image"] for s in samples if isinstance(s.content.get("image"), Path))  # type: ignore[misc]


def _partition(dataset: Dataset, federation: FederationConfig, seed: int) -> tuple[list[str], Indices]:
    """Names of the clients, and positions in the training split."""
    samples, count, alpha, least = dataset.train, federation.num_clients, federation.alpha, federation.min_partition_size
    rng, categories = generator(seed, "partition"), [sample.category for sample in dataset.train]
    names = [client_id(i, count) for i in range(count)]
    if federation.protocol == "reference":
        return names, reference.dirichlet(categories, samples[0].options or sorted(set(categories)), count, alpha)
    if federation.partition == "iid":
        return names, iid(len(samples), count, least, rng)
    if federation.partition == "quantity":
        return names, quantity(len(samples), count, alpha, least, rng)
    if federation.partition == "natural":
        owners = [sample.client for sample in samples]
        own_names = sorted(set(owners))
        return own_names if len(own_names) == count else names, natural(owners, count, least)
    if federation.partition == "domain":
        if dataset.name != "mixture":
            raise ConfigError(
                f"federation.partition: domain spreads the datasets of a mixture, {dataset.name} is a single dataset; use data.dataset=mixture"
            )
        return names, by_domain([sample.domain for sample in samples], categories, count, alpha, least, rng)
    return names, dirichlet(categories, count, alpha, least, rng)


def client_id(index: int, num_clients: int) -> str:
    """``client-07``: as many digits as the largest needs, so that ids sort like numbers."""
    return f"client-{index:0{max(2, len(str(num_clients - 1)))}d}"


def _refuse_empty(clients: Mapping[str, Sequence[Sample]], complete: Mapping[str, Sequence[Sample]], scenario: str) -> None:
    empty = [f"{name}: 0 of {len(complete[name])} samples left" for name, samples in clients.items() if not samples]
    if empty:
        raise DataError(
            f"every client needs a sample; under scenario {scenario} these have none:\n{listing(empty)}\n"
            "use fewer clients, a larger federation.min_partition_size or a milder scenario"
        )


def manifest(data: FederatedData, scenario: str, seed: int) -> Record:
    """The split as JSON: who holds which samples with which modalities, and the counts."""
    clients = [
        {"id": name, **_counts(samples), "samples": [{"id": s.id, "modalities": list(s.modalities)} for s in samples]}
        for name, samples in data.clients.items()
    ]
    dataset = data.dataset
    return {
        "dataset": dataset.name,
        "scenario": scenario,
        "seed": seed,
        "metric": dataset.metric,
        "notes": list(dataset.notes),
        "dropped": data.dropped,
        "clients": clients,
        "test": _counts(dataset.test),
    }


def _counts(samples: Sequence[Sample]) -> Record:
    labels = Counter(sample.category for sample in samples)
    modalities = Counter("+".join(sample.modalities) or "none" for sample in samples)
    return {"num_samples": len(samples), "labels": dict(sorted(labels.items())), "modalities": dict(sorted(modalities.items()))}
