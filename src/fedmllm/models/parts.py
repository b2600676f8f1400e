"""Selects what trains: adapters on the decoder and, if configured, the connector and the embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import nn

from fedmllm.errors import ModelError
from fedmllm.models.families.generic import ModelFamily
from fedmllm.settings_file import ADVANCED


class LoraConfig(BaseModel):
    """Low-rank adapters: ``W x`` becomes ``W x + s B A x`` with s = alpha / r (Hu et al., 2021, arXiv 2106.09685)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: int = Field(8, gt=0)
    """Rank of the adapters."""
    alpha: float = Field(16, gt=0)
    """Scale of the adapters: the product ``B A`` is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an input of an adapter is set to zero in training."""
    targets: Literal["attention", "all-linear"] = "attention"
    """Linear layers of the decoder that get adapters: ``attention`` for the projections q, k, v and o, ``all-linear`` for the feed-forward
    layers as well."""
    rslora: bool = Field(False, json_schema_extra=ADVANCED)
    """Scale by alpha / sqrt(r) instead of alpha / r, which helps at high ranks (rsLoRA; Kalajdzievski, 2023, arXiv 2312.03732)."""
    dora: bool = Field(False, json_schema_extra=ADVANCED)
    """Train the norm of every row of ``W + s B A`` separately from its direction (DoRA; Liu et al., ICML 2024). Clients then train one by
    one instead of in parallel."""
    connector: Literal["frozen", "lora", "full"] = Field("frozen", json_schema_extra=ADVANCED)
    """How the layers between vision tower and decoder train: not at all, with adapters, or in full. With ``full``, clients send the whole
    layers. Unless frozen, clients train one by one instead of in parallel."""
    embeddings: Literal["frozen", "full"] = Field("frozen", json_schema_extra=ADVANCED)
    """Whether the token embeddings train, together with the output head if it is the same matrix. With ``full``, clients send the whole
    matrix and train one by one instead of in parallel."""
    client_ranks: tuple[int, ...] = ()
    """Ranks of the clients, at most r, e.g. ``[2, 4, 8]``. The list repeats if there are more clients. Empty gives every client rank r. The
    scale is always that of r."""

    @field_validator("client_ranks")
    @classmethod
    def _within(cls, ranks: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        r = info.data.get("r", 0)
        if wrong := [rank for rank in ranks if not 1 <= rank <= r]:
            raise ValueError(f"a client's rank must be between 1 and r = {r}, got {wrong[0]}; raise lora.r")
        return ranks

    @property
    def trains_in_parallel(self) -> bool:
        """Whether clients can train in parallel, which requires that only LoRA factors on the decoder's layers train."""
        return not self.dora and self.connector == self.embeddings == "frozen"

    def rank_of(self, position: int) -> int | None:
        """Return the rank of the client at a position; None for r."""
        return self.client_ranks[position % len(self.client_ranks)] if self.client_ranks else None


@dataclass(frozen=True)
class Part:
    """A group of modules that can train.

    Attributes:
        name: the name shown in the report.
        parameters: number of parameters that train if the group trains.
        trains: whether the group trains under the settings.
    """

    name: str
    parameters: int
    trains: bool


def parts(model: Any, family: ModelFamily, config: LoraConfig) -> list[Part]:
    """Return everything that can train, with its number of parameters at the configured rank.

    Args:
        model: a model without adapters, on any device.
        family: the model's family.
        config: the settings.
    """
    modules, connector = dict(model.named_modules()), set(family.connector(model))
    decoder = [modules[name] for name in _linear(model, _matches(family.lora_modules(model, config.targets)))]
    bridge = [modules[name] for name in _linear(model, lambda name: _inside(name, connector))]
    return [
        Part(f"decoder, LoRA on {config.targets}", _adapters(decoder, config), True),
        Part("connector, LoRA", _adapters(bridge, config), config.connector == "lora"),
        Part("connector", _size(modules[name] for name in connector), config.connector == "full"),
        Part("embeddings", _size([model.get_input_embeddings()]), config.embeddings == "full"),
    ]


def adapted_modules(model: Any, family: ModelFamily, config: LoraConfig) -> str:
    """Return a regular expression that matches the layers that get adapters.

    Raises:
        ModelError: if the decoder, or the connector if it gets adapters, has no such layer.
    """
    decoder = family.lora_modules(model, config.targets)
    if not _linear(model, _matches(decoder)):
        raise ModelError(f"lora.targets: {config.targets} matches no linear layer of the model's decoder ({decoder})")
    if config.connector != "lora":
        return decoder
    connector = set(family.connector(model))
    found = _linear(model, lambda name: _inside(name, connector))
    if not found:
        raise ModelError("lora.connector: the model's connector has no linear layer for an adapter; use full or frozen")
    return "|".join([decoder, *map(re.escape, found)])


def whole_modules(model: Any, family: ModelFamily, config: LoraConfig) -> list[str]:
    """Return the names of the modules that train in full.

    Raises:
        ModelError: if the connector is to train but is not known.
    """
    connector = family.connector(model) if config.connector == "full" else []
    if config.connector == "full" and not connector:
        raise ModelError("lora.connector: this model's connector is not known; leave it frozen, or write a family file that names it")
    embeddings = model.get_input_embeddings()
    return [*connector, *(name for name, module in model.named_modules() if config.embeddings == "full" and module is embeddings)]


def _linear(model: nn.Module, chosen: Callable[[str], Any]) -> list[str]:
    """Return the names of linear layers. Subclasses of Linear are left out, because other modules may use their weights without calling
    them; quantized linear layers are always called."""
    return [name for name, module in model.named_modules() if chosen(name) and type(module).__name__ in ("Linear", "Linear4bit")]


def _matches(pattern: str) -> Callable[[str], Any]:
    return re.compile(pattern).fullmatch


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _adapters(layers: Iterable[Any], config: LoraConfig) -> int:
    """Return the number of parameters of both factors and, with DoRA, of the row norms."""
    return sum(config.r * (layer.in_features + layer.out_features) + config.dora * layer.out_features for layer in layers)


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
