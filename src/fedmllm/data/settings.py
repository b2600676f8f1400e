"""The settings sections ``data`` and ``federation`` of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedmllm.data.datasets import DATASETS
from fedmllm.data.datasets.base import SPLITS, VALIDATION_SHARE, check_options
from fedmllm.data.datasets.rows import OnBadSample
from fedmllm.data.prompts import WORDINGS, Wording
from fedmllm.data.quality import parse_part
from fedmllm.data.scenarios import Protocol, parse_scenario
from fedmllm.explain import meant
from fedmllm.settings_file import ADVANCED

DEFAULT_ALPHA = 0.5

Sampling = Literal["uniform", "cyclic", "poisson"]
"""How cohorts are chosen."""


class DataConfig(BaseModel):
    """The dataset, and how its samples are worded."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dataset: str = "digits-claims"
    """Name of the dataset; ``fedmllm data list`` lists them."""
    root: Path | None = None
    """Folder of the dataset's files; null for embedded datasets. Relative paths start at the working directory."""
    prompt: str = "agnostic"
    """Wording of the prompts. ``agnostic`` uses one wording for all samples and asks to answer regardless of modality; ``neutral`` is the same
    without that request; ``specific`` names the modalities of each sample. Or a name from ``wordings``."""
    wordings: dict[str, Wording] = Field(default_factory=dict)
    """Your own wordings by name."""
    num_train: int | None = Field(None, gt=0)
    """Number of training samples over all clients; null for all available."""
    num_test: int | None = Field(None, gt=0)
    """Number of test samples; null for all available."""
    num_validation: int | None = Field(None, gt=0, json_schema_extra=ADVANCED)
    """Number of validation samples; null for all available, but at most as many as test samples."""
    validation_share: float = Field(VALIDATION_SHARE, ge=0, lt=1)
    """Share of the training samples to hold out as the validation split, for datasets without one. 0 trains on all samples."""
    check_images: bool = Field(True, json_schema_extra=ADVANCED)
    """Decode every image file once before the run starts. ``on_bad_sample`` determines what happens to broken images."""
    on_bad_sample: OnBadSample = "refuse"
    """``refuse`` stops with an error that lists all bad rows; ``skip`` leaves them out and lists them in the report."""
    deduplicate: bool = False
    """Remove training samples that repeat another training sample, also occur in the validation or test split, or show an image of the test
    split, and validation samples that also occur in the test split. If false, they are only counted."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings specific to the dataset; the datasets page of the documentation lists them."""

    @field_validator("root")
    @classmethod
    def _home(cls, root: Path | None) -> Path | None:
        return root.expanduser() if root else None

    @field_validator("dataset")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DATASETS:
            raise ValueError(f"{name!r} is not a known dataset{meant(name, DATASETS)}")
        return name

    @model_validator(mode="after")
    def _worded(self) -> DataConfig:
        if taken := sorted(set(self.wordings) & set(WORDINGS)):
            raise ValueError(f"wordings: {', '.join(taken)} cannot be changed; choose another name")
        if self.prompt not in {*WORDINGS, *self.wordings}:
            raise ValueError(f"prompt: {self.prompt!r} is not a known wording; known: {', '.join((*WORDINGS, *self.wordings))}")
        return self

    @property
    def wording(self) -> Wording:
        """The wording that ``prompt`` selects."""
        return self.wordings.get(self.prompt) or WORDINGS[self.prompt]

    @model_validator(mode="after")
    def _suited(self) -> DataConfig:
        check_options(DATASETS[self.dataset].options(), self.options)
        return self

    @property
    def roots(self) -> tuple[Path, ...]:
        """Every folder that is read: the dataset's, or those of a mixture's datasets."""
        parts = getattr(check_options(DATASETS[self.dataset].options(), self.options), "parts", ())
        return tuple(root for root in (self.root, *(part.root for part in parts)) if root is not None)

    @property
    def sources(self) -> tuple[Path, ...]:
        """All ``roots``, and row files outside them that are given as absolute paths."""
        options = check_options(DATASETS[self.dataset].options(), self.options)
        held = (options, *(check_options(DATASETS[part.dataset].options(), part.options) for part in getattr(options, "parts", ())))
        named = (getattr(one, split, None) for one in held for split in SPLITS)
        return (*self.roots, *(Path(name) for name in named if name and Path(name).is_absolute()))

    def without_paths(self) -> DataConfig:
        """Return the settings without paths of this machine: no folders, and only the names of files given as absolute paths."""
        return self.model_copy(update={"root": None, "options": _without_paths(self.options)})


def _without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Remove local paths from the settings of a dataset, or of a mixture's datasets."""
    kept: dict[str, Any] = {
        key: Path(value).name if key in SPLITS and value and Path(value).is_absolute() else value for key, value in options.items()
    }
    if "parts" in kept:
        kept["parts"] = [{**part, "root": None, "options": _without_paths(part.get("options", {}))} for part in kept["parts"]]
    return kept


class FederationConfig(BaseModel):
    """The clients, the partition of the data over them, and the number of rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_clients: int = Field(10, gt=0)
    """Number of clients in the federation."""
    clients_per_round: int = Field(2, gt=0)
    """Number of clients in each round's cohort; with ``sampling: poisson``, the expected number."""
    sampling: Sampling = "uniform"
    """How each round's cohort is chosen: ``uniform`` (at random without replacement), ``cyclic`` (fixed groups of clients take turns), or
    ``poisson`` (each client on its own with probability clients_per_round / num_clients, in secret; with ``privacy.unit: client`` only)."""
    num_rounds: int = Field(25, gt=0)
    """Number of communication rounds."""
    scenario: str = "aligned"
    """The modality scenario, which determines the modalities that each client and sample keeps: ``aligned``, ``missing-RATE``,
    ``cross-IMAGE:TEXT`` or ``hybrid-PROBABILITY``."""
    partition: Literal["dirichlet", "iid", "quantity", "natural", "domain"] = "dirichlet"
    """How samples are divided among clients: with label skew (``dirichlet``), with skewed sizes (``quantity``), evenly at random (``iid``), by
    the clients named in the data (``natural``), or with one dataset of a mixture for each client (``domain``)."""
    dirichlet_alpha: float | None = Field(None, gt=0, le=1e9)
    """Concentration of the Dirichlet distribution; smaller values give more skew. Null uses the scenario's value (``aligned-ALPHA``), or 0.5."""
    protocol: Protocol = Field("clean", json_schema_extra=ADVANCED)
    """``clean`` draws splits that do not depend on the order of files. ``reference`` reproduces the splits of the published reference code."""
    heterogeneity: tuple[str, ...] = ()
    """Corruptions of the training samples, e.g. ``[blur-0.3, typos-0.2@client]``. They are applied before the scenario removes modalities."""
    keep_empty: bool = Field(False, json_schema_extra=ADVANCED)
    """Keep samples that lost every modality, as the reference code does. If false, they are removed and counted."""
    min_partition_size: int = Field(8, gt=0, json_schema_extra=ADVANCED)
    """Minimum number of samples per client. Only samples that the client can hold under the scenario count, before ``missing`` removes
    modalities."""

    @field_validator("scenario")
    @classmethod
    def _parses(cls, text: str) -> str:
        parse_scenario(text)
        return text

    @field_validator("heterogeneity")
    @classmethod
    def _known_parts(cls, parts: tuple[str, ...]) -> tuple[str, ...]:
        for part in parts:
            parse_part(part)
        return parts

    @model_validator(mode="after")
    def _consistent(self) -> FederationConfig:
        if self.clients_per_round > self.num_clients:
            raise ValueError(
                f"clients_per_round: a round samples {self.clients_per_round} clients, but num_clients is {self.num_clients}; "
                "lower clients_per_round"
            )
        if self.sampling == "cyclic" and self.num_clients % self.clients_per_round:
            fitting = [m for m in range(1, self.num_clients + 1) if self.num_clients % m == 0]
            raise ValueError(
                f"sampling: cyclic divides the clients into groups of {self.clients_per_round}, but num_clients is {self.num_clients}; set "
                f"clients_per_round to one of {', '.join(map(str, fitting))}"
            )
        name, level = parse_scenario(self.scenario)
        fixed = float(level) if name == "aligned" and level else None
        if fixed is not None and self.dirichlet_alpha not in (None, fixed):
            raise ValueError(f"dirichlet_alpha: {self.dirichlet_alpha} contradicts scenario {self.scenario}; keep one of them")
        if self.partition in ("iid", "natural") and (self.dirichlet_alpha is not None or fixed is not None):
            raise ValueError(f"dirichlet_alpha: partition {self.partition} has no skew to set; leave alpha out or use partition dirichlet")
        if self.protocol == "reference" and self.partition != "dirichlet":
            raise ValueError("protocol: the reference code supports only partition dirichlet; use it, or protocol clean")
        return self

    @property
    def alpha(self) -> float:
        """The Dirichlet concentration that applies, given ``dirichlet_alpha`` and the scenario."""
        name, level = parse_scenario(self.scenario)
        if name == "aligned" and level:
            return float(level)
        return DEFAULT_ALPHA if self.dirichlet_alpha is None else self.dirichlet_alpha
