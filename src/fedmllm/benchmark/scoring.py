"""Scoring a trained adapter: ``fedmllm evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmllm.config import Experiment
from fedmllm.data.federated import load
from fedmllm.errors import RunError
from fedmllm.evaluation.evaluate import evaluate
from fedmllm.models.load import choose_device, load_model
from fedmllm.models.lora import load_adapter
from fedmllm.training.batches import Encoder
from fedmllm.types import Metrics


def score_adapter(path: Path, experiment_file: Path | None = None, overrides: Sequence[str] = ()) -> tuple[str, Metrics]:
    """(name of the headline metric, all metrics) of an adapter on its experiment's test split.

    Args:
        path: a run folder, or a PEFT adapter folder.
        experiment_file: names model and data; by default the run's own ``config.yaml``.
        overrides: settings as ``key.path=value``, e.g. where the data lie now.

    Raises:
        RunError: if neither the folder nor the arguments say which experiment it is.
    """
    adapter = path / "adapter" if (path / "adapter").is_dir() else path
    experiment = Experiment.load(experiment_file or _own_config(path, adapter), overrides)
    data = experiment.data
    dataset = load(data, experiment.seed)
    vlm = load_adapter(load_model(experiment.model, choose_device(experiment.engine.device)), adapter)
    return dataset.metric, evaluate(vlm, dataset.test, Encoder(vlm, data.prompt), dataset.metric, experiment.evaluation, experiment.seed)


def _own_config(path: Path, adapter: Path) -> Path:
    """The ``config.yaml`` of the run that the folder is, or lies in; a client's own adapter lies one folder deeper."""
    for folder in (path, *adapter.resolve().parents[:2]):
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise RunError(f"{path}: no config.yaml here or beside it; name the experiment with --experiment FILE.yaml")
