"""A run's numbers, as they come, for the tools that draw them: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedmllm.config import Experiment, flattened
from fedmllm.errors import ConfigError
from fedmllm.registry import index
from fedmllm.types import Record

Log = Callable[[Mapping[str, float], int], None]
"""(numbers by name, round) -> written down."""
_COUNTED = ("score", "loss", "learning_rate", "bytes_up", "bytes_down", "num_samples")
"""Of a round's record."""
_NAMED = 50
"""Clients of a round, up to which each one's loss is written down."""


def numbers(record: Record) -> dict[str, float]:
    """A round's record as ``stage/name``: scores, loss, in all and by client, bytes, seconds by activity, how many updates were refused."""
    values = {name: record.get(name) for name in _COUNTED} | dict(record.get("scores") or {})
    values |= {f"validation {name}": value for name, value in (record.get("validation") or {}).items()}
    values |= {f"seconds_{name}": value for name, value in record["seconds"].items()}
    if len(losses := record.get("losses", {})) <= _NAMED:
        values |= {f"loss of {client}": loss for client, loss in losses.items()}
    if "refused" in record:
        values |= {"refused": len(record["refused"]), "skipped": int(record.get("skipped", False))}
        values |= {"halvings": max(record.get("halvings", {}).values(), default=0)}
    return {f"{record['stage']}/{name}": float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are unknown or not installed, before anything is trained.

    Raises:
        ConfigError: naming the first.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--track: {name!r} is no tracker; use {', '.join(TRACKERS)} or none")
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--track: {name} is not installed; pip install {name}, or choose another or none")


@contextmanager
def tracked(names: Sequence[str], folder: Path, experiment: Experiment, name: str) -> Iterator[Callable[[Record], None]]:
    """In this block rounds are written down by some trackers.

    Args:
        names: of ``TRACKERS``.
        folder: the run's.
        experiment: its settings.
        name: of the experiment.

    Yields:
        what to tell each round's record.
    """
    with ExitStack() as stack:
        logs = [stack.enter_context(TRACKERS[tracker](folder, experiment, name)) for tracker in names]

        def tell(record: Record) -> None:
            with _uninterrupted():
                for log in logs:
                    log(numbers(record), record["round"])

        yield tell


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """An interruption from the keyboard waits for the end of this block.

    Trackers write in threads of their own: interrupted with a lock in hand that such a thread waits for, the process would never end.
    """
    before, caught = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *seen: caught.append(seen))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        before(*caught[0])


@contextmanager
def _tensorboard(folder: Path, experiment: Experiment, name: str) -> Iterator[Log]:
    """Event files in the run folder, for ``tensorboard --logdir``."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), max_queue=10_000, flush_secs=10) as writer:
        writer.add_text("experiment", f"    {experiment.to_yaml()}".replace("\n", "\n    "))

        def log(values: Mapping[str, float], round_num: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, round_num)

        yield log


@contextmanager
def _wandb(folder: Path, experiment: Experiment, name: str) -> Iterator[Log]:
    """A run of the project ``fedmllm``, where and how the environment says (``WANDB_PROJECT``, ``WANDB_MODE``)."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "fedmllm")
    with wandb.init(project=project, dir=str(folder), name=name, config=_settings(experiment)) as run:

        def log(values: Mapping[str, float], round_num: int) -> None:
            # Every stage counts its rounds from one, and a run's own steps may only grow.
            run.log({**values, "round": round_num})

        yield log


@contextmanager
def _mlflow(folder: Path, experiment: Experiment, name: str) -> Iterator[Log]:
    """A run where the environment says (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``)."""
    import mlflow

    with mlflow.start_run(run_name=name):
        mlflow.log_params(_settings(experiment) | {"run_folder": str(folder)})
        yield lambda values, round_num: mlflow.log_metrics(dict(values), step=round_num)


def _settings(experiment: Experiment) -> dict[str, Any]:
    return {".".join(path): value for path, value in flattened(experiment)}


Tracker = Callable[[Path, Experiment, str], AbstractContextManager[Log]]
"""(run folder, settings, name of the experiment) -> a context in which numbers are written down."""
_PACKAGES = ("tensorboard", "wandb", "mlflow")
"""Trackers of the package that need one of their own name."""
TRACKERS: dict[str, Tracker] = index("tracker", {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow})
