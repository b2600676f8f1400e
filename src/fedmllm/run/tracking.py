"""Sends a run's metrics to trackers while it runs: TensorBoard, Weights & Biases, MLflow."""

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
"""(metrics by name, round) -> None; writes the metrics to a tracker."""
_COUNTED = ("score", "loss", "learning_rate", "bytes_up", "bytes_down", "num_samples")
"""Fields of a round's record that trackers get under the same name."""
_NAMED = 50
"""Rounds with more clients than this do not log each client's loss."""


def numbers(record: Record) -> dict[str, float]:
    """Return a round's metrics by ``stage/name``: scores, losses (mean and per client), bytes, seconds by activity, number of refused updates."""
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
    """Check that all trackers are known and installed, before training starts.

    Raises:
        ConfigError: naming the first tracker that is not.
    """
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--track: {name!r} is not a tracker; use {', '.join(TRACKERS)} or none")
        if name in _PACKAGES and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--track: {name} is not installed; run pip install {name}, or choose another tracker or none")


@contextmanager
def tracked(names: Sequence[str], folder: Path, experiment: Experiment, name: str) -> Iterator[Callable[[Record], None]]:
    """Open trackers for the duration of a ``with`` block.

    Args:
        names: names of ``TRACKERS``.
        folder: the run folder.
        experiment: the experiment.
        name: the experiment's name.

    Yields:
        A function that sends a round's record to the trackers.
    """
    with ExitStack() as stack:
        logs = [stack.enter_context(TRACKERS[tracker](folder, experiment, name)) for tracker in names]

        def report(record: Record) -> None:
            with _uninterrupted():
                for log in logs:
                    log(numbers(record), record["round"])

        yield report


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Delay a keyboard interrupt until the end of the ``with`` block.

    Trackers write in their own threads. If an interrupt left a lock held that such a thread needs, the process would never exit.
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
    """Write event files to the run folder, for ``tensorboard --logdir``."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / "tensorboard"), max_queue=10_000, flush_secs=10) as writer:
        writer.add_text("experiment", f"    {experiment.to_yaml()}".replace("\n", "\n    "))

        def log(values: Mapping[str, float], round_num: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, round_num)

        yield log


@contextmanager
def _wandb(folder: Path, experiment: Experiment, name: str) -> Iterator[Log]:
    """Log to a run of the project ``fedmllm``, unless environment variables say otherwise (``WANDB_PROJECT``, ``WANDB_MODE``)."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "fedmllm")
    with wandb.init(project=project, dir=str(folder), name=name, config=_settings(experiment)) as run:

        def log(values: Mapping[str, float], round_num: int) -> None:
            # Every stage counts its rounds from one, but the steps of a W&B run must increase.
            run.log({**values, "round": round_num})

        yield log


@contextmanager
def _mlflow(folder: Path, experiment: Experiment, name: str) -> Iterator[Log]:
    """Log to an MLflow run, as environment variables say (``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``)."""
    import mlflow

    with mlflow.start_run(run_name=name):
        mlflow.log_params(_settings(experiment) | {"run_folder": str(folder)})
        yield lambda values, round_num: mlflow.log_metrics(dict(values), step=round_num)


def _settings(experiment: Experiment) -> dict[str, Any]:
    return {".".join(path): value for path, value in flattened(experiment)}


Tracker = Callable[[Path, Experiment, str], AbstractContextManager[Log]]
"""(run folder, settings, name of the experiment) -> a context manager that yields the tracker's ``Log``."""
_PACKAGES = ("tensorboard", "wandb", "mlflow")
"""The package's own trackers, each of which needs the library of the same name."""
TRACKERS: dict[str, Tracker] = index("tracker", {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow})
