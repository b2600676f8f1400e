"""Federated fine-tuning of multimodal LLMs across clients whose modalities differ.

    import fedmllm

    experiment = fedmllm.Experiment.load("experiments/quickstart.yaml", ["federation.num_rounds=5"])
    result = fedmllm.train(experiment, "runs/mine")
    print(result.scores)

Heavy imports happen when a name is first used, so that ``import fedmllm`` and the command line's help stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmllm.api import evaluate, load_adapter, predict, report, sweep, train
    from fedmllm.config import Experiment
    from fedmllm.errors import FedMLLMError
    from fedmllm.plugins import (
        register_corruption,
        register_dataset,
        register_family,
        register_headline,
        register_method,
        register_metric,
        register_scenario,
        register_schedule,
        register_strategy,
        register_tracker,
    )
    from fedmllm.run.results import RunResult

__version__ = "0.1.0"

_HOMES = {
    "Experiment": "fedmllm.config",
    "FedMLLMError": "fedmllm.errors",
    "RunResult": "fedmllm.run.results",
    **dict.fromkeys(
        (
            *("register_corruption", "register_dataset", "register_family", "register_headline", "register_method"),
            *("register_metric", "register_scenario", "register_schedule", "register_strategy", "register_tracker"),
        ),
        "fedmllm.plugins",
    ),
    **dict.fromkeys(("audit", "evaluate", "load_adapter", "predict", "report", "sweep", "train"), "fedmllm.api"),
}

__all__ = [
    "Experiment",
    "FedMLLMError",
    "RunResult",
    "__version__",
    "audit",
    "evaluate",
    "load_adapter",
    "predict",
    "register_corruption",
    "register_dataset",
    "register_family",
    "register_headline",
    "register_method",
    "register_metric",
    "register_scenario",
    "register_schedule",
    "register_strategy",
    "register_tracker",
    "report",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fedmllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
