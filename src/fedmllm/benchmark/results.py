"""What a finished run says: ``result.json``."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from fedmllm import __version__
from fedmllm.errors import RunError
from fedmllm.types import Metrics, Record

SCORES = ("zero_shot", "local_mean", "federated", "centralized", "ceiling")


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run, as written to ``result.json``.

    Attributes:
        experiment: its name, from the file's.
        metric: what ``scores`` measure.
        scores: by ``SCORES``, each in [0, 1]; None where not asked for or not known.
        standard_errors: of the same, over the test samples; for ``local_mean`` over the clients.
        details: all metrics by stage.
        local: each client's score when it trains alone.
        majority: score of always giving the most frequent training answer.
        bytes_up, bytes_down: what all clients of the federated stage sent and received.
        seconds: wall time of training and evaluation, over all sittings.
        seconds_by_stage: the same by stage.
    """

    experiment: str
    metric: str
    scores: dict[str, float | None]
    standard_errors: dict[str, float | None]
    details: dict[str, Metrics]
    local: dict[str, float]
    majority: float
    bytes_up: int
    bytes_down: int
    seconds: float
    seconds_by_stage: dict[str, float]
    seed: int
    versions: dict[str, str]
    num_rounds: int
    num_clients: int
    clients_per_round: int
    trainable_parameters: int
    algorithm: str
    strategies: list[str]
    model: str

    def to_record(self) -> Record:
        """The JSON object."""
        return asdict(self)


def read_result(run: Path) -> RunResult:
    """The result of a run folder.

    Raises:
        RunError: if there is none, or it is not one of ours.
    """
    path = run / "result.json"
    try:
        return RunResult(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; the run is unfinished: finish it with fedmllm train ... --resume") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise RunError(f"{path}: not a result of this version ({error}); run the experiment anew") from error


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    names = ("torch", "transformers", "peft", "numpy", "scikit-learn", "pillow")
    return {"fedmllm": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}
