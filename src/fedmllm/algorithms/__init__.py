"""The index of federated methods, by the names used in ``algorithm.name``. Each method has its own file."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedmllm.algorithms.base import Algorithm
from fedmllm.algorithms.calibrated_flexlora import CalibratedFlexLoRA
from fedmllm.algorithms.ditto import Ditto
from fedmllm.algorithms.fedadagrad import FedAdagrad
from fedmllm.algorithms.fedadam import FedAdam
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.fedavgm import FedAvgM
from fedmllm.algorithms.fedex_lora import FedExLoRA
from fedmllm.algorithms.fedilora import FediLoRA
from fedmllm.algorithms.fedit import FedIT
from fedmllm.algorithms.fednova import FedNova
from fedmllm.algorithms.fedprox import FedProx
from fedmllm.algorithms.fedsa_lora import FedSALoRA
from fedmllm.algorithms.fedyogi import FedYogi
from fedmllm.algorithms.ffa_lora import FFALoRA
from fedmllm.algorithms.flexlora import FlexLoRA
from fedmllm.algorithms.flora import FLoRA
from fedmllm.algorithms.hetlora import HetLoRA
from fedmllm.algorithms.krum import Krum
from fedmllm.algorithms.median import Median
from fedmllm.algorithms.rolora import RoLoRA
from fedmllm.algorithms.scaffold import Scaffold
from fedmllm.algorithms.state import NONE_OUTSTANDING, Aggregate, Client, Member, Outstanding, ServerState
from fedmllm.algorithms.strategies import STRATEGIES, Composed, Holdings, Remark, Strategy
from fedmllm.algorithms.transforms import Chain, ClientContext, Codec, Packed, UpdateTransform
from fedmllm.algorithms.trimmed_mean import TrimmedMean
from fedmllm.algorithms.yoco import YOCO
from fedmllm.errors import ConfigError
from fedmllm.explain import tell_renamed
from fedmllm.registry import Value, built, index

__all__ = [
    "ALGORITHMS",
    "NONE_OUTSTANDING",
    "STRATEGIES",
    "Aggregate",
    "Algorithm",
    "AlgorithmConfig",
    "Chain",
    "Client",
    "ClientContext",
    "Codec",
    "Holdings",
    "Member",
    "Outstanding",
    "Packed",
    "Remark",
    "ServerState",
    "StrategyConfig",
    "UpdateTransform",
    "build_algorithm",
    "remarks",
]

ALGORITHMS: dict[str, type[Any]] = index(
    "method",
    {
        "calibrated_flexlora": CalibratedFlexLoRA,
        "ditto": Ditto,
        "fedadagrad": FedAdagrad,
        "fedadam": FedAdam,
        "fedavg": FedAvg,
        "fedavgm": FedAvgM,
        "fedex_lora": FedExLoRA,
        "fedilora": FediLoRA,
        "fedit": FedIT,
        "fednova": FedNova,
        "fedprox": FedProx,
        "fedsa_lora": FedSALoRA,
        "fedyogi": FedYogi,
        "ffa_lora": FFALoRA,
        "flexlora": FlexLoRA,
        "flora": FLoRA,
        "hetlora": HetLoRA,
        "krum": Krum,
        "median": Median,
        "rolora": RoLoRA,
        "scaffold": Scaffold,
        "trimmed_mean": TrimmedMean,
        "yoco": YOCO,
    },
)

RENAMED = {"fedmllm": "calibrated_flexlora"}
"""Former names of methods, which experiments may still use."""

_FEDMLLM = re.compile(r"fedmllm\((.*)\)", re.IGNORECASE)
PUBLISHED = ("agnostic_prompt", "adaptive_regularization")
"""The strategies that ``FedMLLM(method)`` adds to a method, with their published constants."""


class StrategyConfig(BaseModel):
    """One strategy and its hyperparameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    """Name of the strategy; ``fedmllm methods`` lists them."""
    parameters: dict[str, Value] = Field(default_factory=dict)
    """The strategy's hyperparameters by name. Those not given take their defaults."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self) -> StrategyConfig:
        built(STRATEGIES, "strategy", self.name, self.parameters)
        return self


class AlgorithmConfig(BaseModel):
    """The federated method, its hyperparameters, and the strategies added to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "fedavg"
    """Name of the method; ``fedmllm methods`` lists them. ``FedMLLM(NAME)`` adds the two published strategies to the method NAME."""
    parameters: dict[str, Value] = Field(default_factory=dict)
    """The method's hyperparameters by name. Those not given take their defaults."""
    strategies: tuple[StrategyConfig, ...] = ()
    """Strategies added to the method, in the order in which they apply. Each is a name or ``{name: ..., parameters: {...}}``."""

    @field_validator("name")
    @classmethod
    def _current(cls, name: str) -> str:
        """Replace a former name, so that the same experiment has one name in results and sweep keys."""
        published = _FEDMLLM.fullmatch(name)
        former = published[1] if published else name
        if former not in RENAMED:
            return name
        tell_renamed(f"algorithm.name: {former}", RENAMED[former])
        return f"FedMLLM({RENAMED[former]})" if published else RENAMED[former]

    @model_validator(mode="after")
    def _known(self) -> AlgorithmConfig:
        build_algorithm(self)
        if twice := [name for name, count in Counter(self.strategy_names).items() if count > 1]:
            raise ValueError(f"strategies: {twice[0]} is listed twice; remove one")
        return self

    @property
    def method(self) -> str:
        """Name of the method without ``FedMLLM(...)``."""
        return self._published[1] if self._published else self.name

    @property
    def _published(self) -> re.Match[str] | None:
        return _FEDMLLM.fullmatch(self.name)

    @property
    def all_strategies(self) -> tuple[StrategyConfig, ...]:
        """The strategies implied by ``FedMLLM(...)``, then those listed in ``strategies``."""
        published = tuple(StrategyConfig(name=name) for name in PUBLISHED) if self._published else ()
        return (*published, *self.strategies)

    @property
    def strategy_names(self) -> tuple[str, ...]:
        """Names of all strategies in the order in which they apply."""
        return tuple(strategy.name for strategy in self.all_strategies)


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """Return the configured method with its strategies.

    Raises:
        ConfigError: if a method, strategy or parameter does not exist, a value is invalid, or a strategy cannot affect the method.
    """
    method = built(ALGORITHMS, "method", config.method, config.parameters)
    strategies = _strategies(config)
    for transform in (transform for strategy in strategies.values() for transform in strategy.transforms):
        try:
            transform.require(method, config.method)
        except ConfigError as error:
            raise ConfigError(f"strategies: {error}") from error
    return cast(Algorithm, Composed(method, tuple(strategies.values())) if strategies else method)


def remarks(config: AlgorithmConfig, holdings: Holdings) -> dict[str, Remark]:
    """Return, by strategy, how it differs from its description in this experiment. Strategies that act as described are left out."""
    found = {name: strategy.remark(holdings) for name, strategy in _strategies(config).items()}
    return {name: remark for name, remark in found.items() if remark is not None}


def _strategies(config: AlgorithmConfig) -> dict[str, Strategy]:
    """Return the strategies by name, in the order in which they apply."""
    return {s.name: built(STRATEGIES, "strategy", s.name, s.parameters) for s in config.all_strategies}
