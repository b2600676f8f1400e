"""What of a model trains: adapters on the decoder, and beside them, if asked for, its connector and its embeddings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import nn

from fedmllm.errors import ModelError
from fedmllm.models.families.generic import ModelFamily


class LoraConfig(BaseModel):
    """Low-rank adapters: ``W x`` becomes ``W x + s B A x`` with s = alpha / r (Hu et al., 2021, arXiv 2106.09685)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: int = Field(8, gt=0)
    """Rank of the update."""
    alpha: float = Field(16, gt=0)
    """Scale; the update is multiplied by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability with which an input of the adapter is zeroed in training."""
    targets: Literal["attention", "all-linear"] = "attention"
    """Which linear layers of the decoder: q, k, v, o, or the feed-forward layers too."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead, for high ranks (Kalajdzievski, 2023, arXiv 2312.03732)."""
    dora: bool = False
    """Train the length of every row of ``W + s B A`` apart from its direction (DoRA; Liu et al., ICML 2024). Clients train one by one."""
    connector: Literal["frozen", "lora", "full"] = "frozen"
    """The layers between vision tower and decoder: adapters on them too, or trained and sent whole. Not frozen, clients train one by one."""
    embeddings: Literal["frozen", "full"] = "frozen"
    """The tokens' embeddings, with the output head where it is the same matrix. Trained they are sent whole, and clients train one by one."""
    client_ranks: tuple[int, ...] = ()
    """Ranks of the clients in turn, e.g. ``[2, 4, 8]``, none above r; empty for r everywhere. The scale stays that of r."""

    @field_validator("client_ranks")
    @classmethod
    def _within(cls, ranks: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        r = info.data.get("r", 0)
        if wrong := [rank for rank in ranks if not 1 <= rank <= r]:
            raise ValueError(f"a client's rank must lie between 1 and r = {r}, is {wrong[0]}; raise lora.r")
        return ranks

    @property
    def side_by_side(self) -> bool:
        """Whether clients can train side by side: nothing but factors on the decoder's layers trains."""
        return not self.dora and self.connector == self.embeddings == "frozen"

    def rank_of(self, position: int) -> int | None:
        """The rank of the client at a position; None for r."""
        return self.client_ranks[position % len(self.client_ranks)] if self.client_ranks else None


@dataclass(frozen=True)
class Part:
    """Something that can train.

    Attributes:
        name: as in the report.
        parameters: how many it would train, or trains.
        trains: whether the settings ask for it.
    """

    name: str
    parameters: int
    trains: bool


def parts(model: Any, family: ModelFamily, config: LoraConfig) -> list[Part]:
    """Everything that can train and what it comes to at these settings' rank; of a model without adapters, on any device.

    Raises:
        ModelError: if what is asked for is not there.
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
    """A pattern of the layers that get adapters.

    Raises:
        ModelError: if there is none of a kind that is asked for.
    """
    decoder = family.lora_modules(model, config.targets)
    if not _linear(model, _matches(decoder)):
        raise ModelError(f"lora.targets: {config.targets} names no linear layer of the model's decoder ({decoder})")
    if config.connector != "lora":
        return decoder
    connector = set(family.connector(model))
    found = _linear(model, lambda name: _inside(name, connector))
    if not found:
        raise ModelError("lora.connector: the model's connector has no linear layer for an adapter; use full, or frozen")
    return "|".join([decoder, *map(re.escape, found)])


def whole_modules(model: Any, family: ModelFamily, config: LoraConfig) -> list[str]:
    """Names of the modules that train whole.

    Raises:
        ModelError: if there is none of a kind that is asked for.
    """
    connector = family.connector(model) if config.connector == "full" else []
    if config.connector == "full" and not connector:
        raise ModelError("lora.connector: no connector is known of this model; leave it frozen, or write a family file that names it")
    embeddings = model.get_input_embeddings()
    return [*connector, *(name for name, module in model.named_modules() if config.embeddings == "full" and module is embeddings)]


def _linear(model: nn.Module, chosen: Callable[[str], Any]) -> list[str]:
    """Linear layers by name. Not those of subclasses, whose weights others may use without calling them; held in few bits, they are called."""
    return [name for name, module in model.named_modules() if chosen(name) and type(module).__name__ in ("Linear", "Linear4bit")]


def _matches(pattern: str) -> Callable[[str], Any]:
    return re.compile(pattern).fullmatch


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _adapters(layers: Iterable[Any], config: LoraConfig) -> int:
    """Parameters of both factors and, of DoRA, the lengths of the rows."""
    return sum(config.r * (layer.in_features + layer.out_features) + config.dora * layer.out_features for layer in layers)


def _size(modules: Iterable[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
