"""The index of federated methods: one file each, found by the name in ``algorithm.name``."""

from __future__ import annotations

import dataclasses
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmllm.algorithms.base import Algorithm, ServerState
from fedmllm.algorithms.fedadagrad import FedAdagrad
from fedmllm.algorithms.fedadam import FedAdam
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.fedavgm import FedAvgM
from fedmllm.algorithms.fedprox import FedProx
from fedmllm.algorithms.fedyogi import FedYogi
from fedmllm.errors import ConfigError

__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmConfig", "ServerState", "build_algorithm"]

ALGORITHMS: dict[str, type[Any]] = {
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedprox": FedProx,
    "fedyogi": FedYogi,
}


class AlgorithmConfig(BaseModel):
    """Which federated method, with its hyper-parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "fedavg"
    """A name of the index of methods."""
    parameters: dict[str, float | bool] = Field(default_factory=dict)
    """The method's own hyper-parameters by name; left out for its defaults."""

    @model_validator(mode="after")
    def _known(self) -> AlgorithmConfig:
        if self.name not in ALGORITHMS:
            raise ValueError(f"name: {self.name!r} is no method; known: {', '.join(ALGORITHMS)}")
        own = [field.name for field in dataclasses.fields(ALGORITHMS[self.name])]
        if unknown := sorted(self.parameters.keys() - set(own)):
            raise ValueError(f"parameters: {self.name} has no {unknown[0]!r}; it takes {', '.join(own) or 'none'}")
        try:
            build_algorithm(self)
        except ConfigError as error:
            raise ValueError(f"parameters: {error}") from error
        return self


def build_algorithm(config: AlgorithmConfig) -> Algorithm:
    """The method a configuration names."""
    algorithm: Algorithm = ALGORITHMS[config.name](**config.parameters)
    return algorithm
