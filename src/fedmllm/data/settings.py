"""The sections ``data`` and ``federation`` of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedmllm.data.datasets import DATASETS
from fedmllm.data.datasets.base import SPLITS, VALIDATION_SHARE, check_options
from fedmllm.data.datasets.rows import OnBadSample
from fedmllm.data.modalities import Protocol, parse_scenario
from fedmllm.data.prompts import WORDINGS, Wording
from fedmllm.data.quality import parse_part
from fedmllm.explain import meant

DEFAULT_ALPHA = 0.5


class DataConfig(BaseModel):
    """Which samples, and how they are worded."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dataset: str = "digits-claims"
    """A name of the index of datasets."""
    root: Path | None = None
    """Folder of the dataset's files; left out for embedded data. Relative paths start at the working directory."""
    prompt: str = "agnostic"
    """``agnostic`` words all samples alike and asks to disregard the modality; ``neutral`` does not ask; ``specific`` names the modalities each sample
    holds; or a name of ``wordings``."""
    wordings: dict[str, Wording] = Field(default_factory=dict)
    """Wordings of your own by name."""
    num_train: int | None = Field(None, gt=0)
    """Training samples over all clients; left out for all there are."""
    num_test: int | None = Field(None, gt=0)
    """Test samples; left out for all there are."""
    num_validation: int | None = Field(None, gt=0)
    """Validation samples; left out for as many as there are, but no more than test samples."""
    validation_share: float = Field(VALIDATION_SHARE, ge=0, lt=1)
    """Share of the training samples that becomes the validation part where the data have none of their own; 0 to train on all."""
    check_images: bool = True
    """Decode every image file once before the run begins; what is done about broken ones ``on_bad_sample`` says."""
    on_bad_sample: OnBadSample = "refuse"
    """``refuse``: one error lists all bad rows. ``skip``: they are left out, counted and listed in the report."""
    deduplicate: bool = False
    """Leave out training samples that repeat another one, are in the test split too, or show a picture of it. Else they are only counted."""
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
            raise ValueError(f"{name!r} is no dataset{meant(name, DATASETS)}")
        return name

    @model_validator(mode="after")
    def _worded(self) -> DataConfig:
        if taken := sorted(set(self.wordings) & set(WORDINGS)):
            raise ValueError(f"wordings: {', '.join(taken)} cannot be changed; choose another name")
        if self.prompt not in {*WORDINGS, *self.wordings}:
            raise ValueError(f"prompt: {self.prompt!r} is no wording; known: {', '.join((*WORDINGS, *self.wordings))}")
        return self

    @property
    def wording(self) -> Wording:
        """The wording in force."""
        return self.wordings.get(self.prompt) or WORDINGS[self.prompt]

    @model_validator(mode="after")
    def _suited(self) -> DataConfig:
        check_options(DATASETS[self.dataset].options(), self.options)
        return self

    @property
    def roots(self) -> tuple[Path, ...]:
        """Every folder that is read: of the dataset, or of a mixture's parts."""
        parts = getattr(check_options(DATASETS[self.dataset].options(), self.options), "parts", ())
        return tuple(root for root in (self.root, *(part.root for part in parts)) if root is not None)

    @property
    def sources(self) -> tuple[Path, ...]:
        """These folders, and files of rows outside them, which are named absolutely."""
        options = check_options(DATASETS[self.dataset].options(), self.options)
        held = (options, *(check_options(DATASETS[part.dataset].options(), part.options) for part in getattr(options, "parts", ())))
        named = (getattr(one, split, None) for one in held for split in SPLITS)
        return (*self.roots, *(Path(name) for name in named if name and Path(name).is_absolute()))

    def without_paths(self) -> DataConfig:
        """The same for another machine: no folder, and of files named absolutely the names alone."""
        return self.model_copy(update={"root": None, "options": _without_paths(self.options)})


def _without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a dataset, or of a mixture's parts."""
    kept: dict[str, Any] = {
        key: Path(value).name if key in SPLITS and value and Path(value).is_absolute() else value for key, value in options.items()
    }
    if "parts" in kept:
        kept["parts"] = [{**part, "root": None, "options": _without_paths(part.get("options", {}))} for part in kept["parts"]]
    return kept


class FederationConfig(BaseModel):
    """Who takes part, how the data are spread and how long it lasts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

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
    dirichlet_alpha: float | None = Field(None, gt=0, le=1e9)
    """Concentration of the skew over labels (or sizes); left out for the scenario's own (``aligned-ALPHA``) or 0.5."""
    protocol: Protocol = "clean"
    """``clean``: independent of file order, seeded by purpose. ``reference``: the published reference code's splits."""
    heterogeneity: tuple[str, ...] = ()
    """What else is wrong with the training samples, e.g. ``[blur-0.3, typos-0.2@client]``; applied before the scenario."""
    keep_empty: bool = False
    """Keep samples that lost every modality, as the reference code does; else they are left out and counted."""
    min_partition_size: int = Field(8, gt=0)
    """Samples every client has, of those that it can hold, before ``missing`` takes modalities away."""

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
