"""Adding to fedmllm from outside: methods, strategies, schedules, datasets and more under names that settings can choose.

    from dataclasses import dataclass

    import fedmllm
    from fedmllm.algorithms.fedavg import FedAvg


    @fedmllm.register_method("half_step")
    @dataclass(frozen=True)
    class HalfStep(FedAvg):
        share: float = 0.5

        def server_step(self, state, aggregate): ...

A file with such lines is a plugin: name it in the experiment, ``plugins: [my_methods.py]``, or install it as an entry point of the group
``fedmllm.plugins``. Loss terms and update transforms need no name: a method or a strategy hands them over.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fedmllm.registry import register, require_hyper_parameters

if TYPE_CHECKING:
    from fedmllm.data.datasets.base import DatasetEntry
    from fedmllm.data.quality import PartEntry
    from fedmllm.data.scenarios import Scenario
    from fedmllm.models.families.generic import ModelFamily

Class = TypeVar("Class", bound=type[Any])
Function = TypeVar("Function", bound=Callable[..., Any])


def register_method(name: str) -> Callable[[Class], Class]:
    """Return a decorator that makes a class a federated method, ``algorithm.name: NAME``.

    The class is a frozen dataclass on ``fedmllm.algorithms.base.ServerAverage`` or on a method; its fields are hyper-parameters.

    Raises:
        ConfigError: if the name is taken, or the class cannot be set up from settings.
    """
    from fedmllm.algorithms.base import ServerAverage

    return _classes("method", name, tuple(ServerAverage.__annotations__))


def register_strategy(name: str) -> Callable[[Class], Class]:
    """Return a decorator that makes a class a strategy, which ``algorithm.strategies`` adds to any method.

    The class is a frozen dataclass on ``fedmllm.algorithms.strategies.Strategy``; its fields are hyper-parameters.

    Raises:
        ConfigError: if the name is taken, or the class cannot be set up from settings.
    """
    return _classes("strategy", name, ("wording",))


def register_schedule(name: str) -> Callable[[Class], Class]:
    """Return a decorator that makes a class a schedule, ``schedule.name: NAME``; see ``fedmllm.engine.schedules.base.Schedule``.

    Raises:
        ConfigError: if the name is taken, or the class cannot be set up from settings.
    """
    return _classes("schedule", name, ())


def register_dataset(name: str, entry: DatasetEntry) -> None:
    """Make a dataset available as ``data.dataset: NAME``.

    Raises:
        ConfigError: if the name is taken.
    """
    register("dataset", name, entry)


def register_family(model_type: str, family: ModelFamily) -> None:
    """Serve models of a Transformers ``model_type`` by a family of your own.

    Raises:
        ConfigError: if there is a family for it already.
    """
    register("family", model_type, family)


def register_scenario(name: str, scenario: Scenario) -> None:
    """Make a modality scenario available as ``federation.scenario: NAME`` or ``NAME-LEVEL``; a name without a dash.

    Raises:
        ConfigError: if the name is taken or has a dash.
    """
    register("scenario", name, scenario, re.compile(r"[a-z0-9][a-z0-9_.]*"), "lowercase letters, digits, _ and .")


def register_corruption(name: str, entry: PartEntry) -> None:
    """Make a kind of heterogeneity available in ``federation.heterogeneity`` and ``evaluation.tested``; lowercase letters and ``_`` only.

    Raises:
        ConfigError: if the name is taken or has other characters.
    """
    register("heterogeneity", name, entry, re.compile(r"[a-z_]+"), "lowercase letters and _")


def register_metric(name: str) -> Callable[[Function], Function]:
    """Return a decorator that reports a function of predictions beside every headline score.

    The function takes a sequence of ``fedmllm.types.Prediction`` and returns a number in [0, 1], or None where it is not defined.

    Raises:
        ConfigError: if the name is taken.
    """
    # The package names its own metrics by dataset and by type of answer with these prefixes.
    allowed, rule = (
        r"(?!score_|accuracy_)[a-z0-9][a-z0-9_.-]*",
        "lowercase letters, digits, _ - and ., not beginning with score_ or accuracy_",
    )
    return lambda function: register("metric", name, function, re.compile(allowed), rule)


def register_headline(name: str) -> Callable[[Function], Function]:
    """Return a decorator that makes a function a headline score, ``data.options.metric: NAME`` or ``Dataset.metric`` of a dataset.

    The function takes one ``fedmllm.types.Prediction`` with an answer and returns a number in [0, 1]. The score is the mean over samples, where
    a failure scores 0. A score that is no mean over samples can be reported beside the headline with ``register_metric``.

    Raises:
        ConfigError: if the name is taken.
    """
    return lambda function: register("headline", name, function)


def register_tracker(name: str) -> Callable[[Function], Function]:
    """Return a decorator that makes a function a tracker, ``fedmllm train --track NAME``.

    The function takes the run folder, the experiment and its name, and returns a context that yields ``log(numbers, round)``.

    Raises:
        ConfigError: if the name is taken.
    """
    return lambda function: register("tracker", name, function)


def _classes(kind: str, name: str, reserved: tuple[str, ...]) -> Callable[[Class], Class]:
    def add(cls: Class) -> Class:
        require_hyper_parameters(cls, reserved)
        return register(kind, name, cls)

    return add
