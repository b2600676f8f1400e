"""The index of federated methods: one file each, found by the name in ``algorithm.name``."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmllm.algorithms.base import NONE_OUTSTANDING, Aggregate, Algorithm, Client, Member, Outstanding, ServerState
from fedmllm.algorithms.ditto import Ditto
from fedmllm.algorithms.fedadagrad import FedAdagrad
from fedmllm.algorithms.fedadam import FedAdam
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.fedavgm import FedAvgM
from fedmllm.algorithms.fedex_lora import FedExLoRA
from fedmllm.algorithms.fedilora import FediLoRA
from fedmllm.algorithms.fedit import FedIT
from fedmllm.algorithms.fedmllm import FedMLLM
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
from fedmllm.algorithms.strategies import STRATEGIES, Composed, Holdings, Remark, Strategy
from fedmllm.algorithms.transforms import Chain, ClientContext, Codec, Packed, UpdateTransform
from fedmllm.algorithms.trimmed_mean import TrimmedMean
from fedmllm.algorithms.yoco import YOCO
from fedmllm.errors import ConfigError
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
        "ditto": Ditto,
        "fedadagrad": FedAdagrad,
        "fedadam": FedAdam,
        "fedavg": FedAvg,
        "fedavgm": FedAvgM,
        "fedex_lora": FedExLoRA,
        "fedilora": FediLoRA,
        "fedit": FedIT,
        "fedmllm": FedMLLM,
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

PUBLISHED = ("agnostic_prompt", "adaptive_regularization")
"""The strategies that FedMLLM(method) adds to a method, with their published constants."""


class StrategyConfig(BaseModel):
    """One strategy, with its hyper-parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    """A name of the index of strategies."""
    parameters: dict[str, Value] = Field(default_factory=dict)
    """The strategy's own hyper-parameters by name; left out for its defaults."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self) -> StrategyConfig:
        built(STRATEGIES, "strategy", self.name, self.parameters)
        return self


class AlgorithmConfig(BaseModel):
    """Which federated method, with its hyper-parameters, and the strategies added to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "fedavg"
    """A name of the index of methods, ``fedmllm`` being the one we recommend, or ``FedMLLM(NAME)`` for a method with the two published
    strategies."""
    parameters: dict[str, Value] = Field(default_factory=dict)
    """The method's own hyper-parameters by name; left out for its defaults."""
    strategies: tuple[StrategyConfig, ...] = ()
    """What is added to the method, each a name or ``{name: ..., parameters: {...}}``."""

    @model_validator(mode="after")
    def _known(self) -> AlgorithmConfig:
        build_algorithm(self)
        if twice := [name for name, count in Counter(self.strategy_names).items() if count > 1]:
            raise ValueError(f"strategies: {twice[0]} is there twice; keep one")
        return self

    @property
    def method(self) -> str:
        """The method without its strategies."""
        return self._published[1] if self._published else self.name

    @property
    def _published(self) -> re.Match[str] | None:
        return re.fullmatch(r"fedmllm\((.*)\)", self.name, re.IGNORECASE)

    @property
    def all_strategies(self) -> tuple[StrategyConfig, ...]:
        """Those that the name brings and those named beside it."""
        published = tuple(StrategyConfig(name=name) for name in PUBLISHED) if self._published else ()
        return (*published, *self.strategies)

    @property
    def strategy_names(self) -> tuple[str, ...]:
        """Names of all strategies, in the order in which they apply."""
        return tuple(strategy.name for strategy in self.all_strategies)


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The method a configuration names, with its strategies.

    Raises:
        ConfigError: if there is no such method, strategy or parameter, a value breaks a rule, or a strategy does nothing to the method.
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
    """By strategy, what is to be known about it before it runs; those that do what they are described to are left out."""
    found = {name: strategy.remark(holdings) for name, strategy in _strategies(config).items()}
    return {name: remark for name, remark in found.items() if remark is not None}


def _strategies(config: AlgorithmConfig) -> dict[str, Strategy]:
    """By name, in the order in which they apply."""
    return {s.name: built(STRATEGIES, "strategy", s.name, s.parameters) for s in config.all_strategies}
