"""Clients with their samples, and the manifest that makes a split checkable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedmllm.data.datasets import DATASETS, Dataset, DatasetRequest, load_dataset
from fedmllm.data.images import check_images
from fedmllm.data.modalities import apply_scenario, parse_scenario
from fedmllm.data.partition import dirichlet, iid
from fedmllm.data.prompts import PromptStyle
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
    """Decode every image file once before the run begins, and refuse to begin if one is broken."""

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
    partition: Literal["dirichlet", "iid"] = "dirichlet"
    """Label skew, or the same mix everywhere."""
    dirichlet_alpha: float | None = Field(None, gt=0)
    """Concentration of the label skew; left out for the scenario's own (``aligned-ALPHA``) or 0.5."""
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
        if self.partition == "iid" and (self.dirichlet_alpha is not None or fixed is not None):
            raise ValueError("dirichlet_alpha: an iid partition has no label skew; leave alpha out or use partition dirichlet")
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
    dataset = load_dataset(data.dataset, DatasetRequest(data.root, seed, data.num_train, data.num_test))
    if data.check_images:
        check_images(value for s in (*dataset.train, *dataset.test) for value in s.content.values() if isinstance(value, Path))
    rng = generator(seed, "partition")
    if federation.partition == "iid":
        parts = iid(len(dataset.train), federation.num_clients, federation.min_partition_size, rng)
    else:
        categories = [sample.category for sample in dataset.train]
        parts = dirichlet(categories, federation.num_clients, federation.alpha, federation.min_partition_size, rng)
    complete = {client_id(i, federation.num_clients): [dataset.train[j] for j in part] for i, part in enumerate(parts)}
    clients, dropped = apply_scenario(federation.scenario, complete, dataset.modalities, seed)
    _refuse_empty(clients, complete, federation.scenario)
    return FederatedData(dataset, clients, dropped)


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
    modalities = Counter("+".join(sample.modalities) for sample in samples)
    return {"num_samples": len(samples), "labels": dict(sorted(labels.items())), "modalities": dict(sorted(modalities.items()))}
