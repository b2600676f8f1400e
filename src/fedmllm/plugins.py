"""Registers your own methods, strategies, schedules, datasets and more under names that settings can select.

    from dataclasses import dataclass

    import fedmllm
    from fedmllm.algorithms.fedavg import FedAvg


    @fedmllm.register_method("half_step")
    @dataclass(frozen=True)
    class HalfStep(FedAvg):
        share: float = 0.5

        def server_step(self, state, aggregate): ...

A file with such lines is a plugin. Name it in the experiment, ``plugins: [my_methods.py]``, or install it as an entry point of the group
``fedmllm.plugins``. Loss terms and update transforms need no name, because a method or a strategy provides them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fedmllm.registry import register, require_hyperparameters

if TYPE_CHECKING:
    from fedmllm.data.datasets.base import DatasetEntry
    from fedmllm.data.quality import PartEntry
    from fedmllm.data.scenarios import Scenario
    from fedmllm.models.families.generic import ModelFamily

Class = TypeVar("Class", bound=type[Any])
Function = TypeVar("Function", bound=Callable[..., Any])


def register_method(name: str) -> Callable[[Class], Class]:
    """Return a decorator that registers a class as a federated method, for ``algorithm.name: NAME``.

    The class is a frozen dataclass derived from ``fedmllm.algorithms.base.ServerAverage`` or from a method. Its fields are hyperparameters.

    Raises:
        ConfigError: if the name is taken, or the class cannot be created from settings.
    """
    from fedmllm.algorithms.base import ServerAverage

    return _classes("method", name, tuple(ServerAverage.__annotations__))


def register_strategy(name: str) -> Callable[[Class], Class]:
    """Return a decorator that registers a class as a strategy, which ``algorithm.strategies`` adds to any method.

    The class is a frozen dataclass derived from ``fedmllm.algorithms.strategies.Strategy``. Its fields are hyperparameters.

    Raises:
        ConfigError: if the name is taken, or the class cannot be created from settings.
    """
    return _classes("strategy", name, ("wording",))


def register_schedule(name: str) -> Callable[[Class], Class]:
    """Return a decorator that registers a class as a schedule, for ``schedule.name: NAME``.

    The class is a frozen dataclass that implements ``fedmllm.engine.schedules.base.Schedule``. Its fields are the schedule's settings.

    Raises:
        ConfigError: if the name is taken, or the class cannot be created from settings.
    """
    return _classes("schedule", name, ())


def register_dataset(name: str, entry: DatasetEntry) -> None:
    """Make a dataset available as ``data.dataset: NAME``.

    Raises:
        ConfigError: if the name is taken.
    """
    register("dataset", name, entry)


def register_family(model_type: str, family: ModelFamily) -> None:
    """Use your own family for models of a Transformers ``model_type``.

    Raises:
        ConfigError: if the type already has a family.
    """
    register("family", model_type, family)


def register_scenario(name: str, scenario: Scenario) -> None:
    """Make a modality scenario available as ``federation.scenario: NAME`` or ``NAME-LEVEL``. The name must not contain a dash.

    Raises:
        ConfigError: if the name is taken or not allowed.
    """
    register("scenario", name, scenario, re.compile(r"[a-z0-9][a-z0-9_.]*"), "lowercase letters, digits, _ and .")


def register_corruption(name: str, entry: PartEntry) -> None:
    """Make a corruption available in ``federation.heterogeneity`` and ``evaluation.tested``. Its name consists of lowercase letters and ``_``.

    Raises:
        ConfigError: if the name is taken or not allowed.
    """
    register("heterogeneity", name, entry, re.compile(r"[a-z_]+"), "lowercase letters and _")


def register_metric(name: str) -> Callable[[Function], Function]:
    """Return a decorator that registers a function as a metric, which is reported next to every headline score.

    The function takes a sequence of ``fedmllm.types.Prediction`` and returns a number in [0, 1], or None if the metric is undefined.

    Raises:
        ConfigError: if the name is taken or not allowed.
    """
    # The package's own metrics by dataset and by answer type have these prefixes.
    allowed, rule = (
        r"(?!score_|accuracy_)[a-z0-9][a-z0-9_.-]*",
        "lowercase letters, digits, _ - and ., not beginning with score_ or accuracy_",
    )
    return lambda function: register("metric", name, function, re.compile(allowed), rule)


def register_headline(name: str) -> Callable[[Function], Function]:
    """Return a decorator that registers a function as a headline score, for ``data.options.metric: NAME`` or a dataset's ``Dataset.metric``.

    The function takes one ``fedmllm.types.Prediction`` with an answer and returns a number in [0, 1]. The score is the mean over samples, where
    a failure scores 0. A score that is not a mean over samples can be reported next to the headline with ``register_metric``.

    Raises:
        ConfigError: if the name is taken.
    """
    return lambda function: register("headline", name, function)


def register_tracker(name: str) -> Callable[[Function], Function]:
    """Return a decorator that registers a function as a tracker, for ``fedmllm train --track NAME``.

    The function takes the run folder, the experiment and its name, and returns a context manager that yields ``log(numbers, round)``.

    Raises:
        ConfigError: if the name is taken.
    """
    return lambda function: register("tracker", name, function)


def _classes(kind: str, name: str, reserved: tuple[str, ...]) -> Callable[[Class], Class]:
    def add(cls: Class) -> Class:
        require_hyperparameters(cls, reserved)
        return register(kind, name, cls)

    return add
