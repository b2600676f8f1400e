"""Finished runs, which several files of this folder look at and must not change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.models.source import model_source
from trained_runs import change


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all baselines."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    values = {
        "data": {"dataset": "digits-claims", "num_train": 60, "num_test": 24},
        "federation": {"num_clients": 3, "clients_per_round": 2, "num_rounds": 3, "scenario": "missing-0.3", "min_partition_size": 10},
        "evaluation": {"every": 2},
        "engine": {"device": "cpu"},
    }
    train(Experiment.parse(values), folder, name="demo")
    return folder


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the embedded model's shapes and other weights."""
    folder = Path(shutil.copytree(model_source("nano"), tmp_path_factory.mktemp("models") / "other"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def personalized(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a personalized method, with scores for each client's models."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    sections = {"algorithm": {"name": "ditto"}, "evaluation": {"every": 1, "baselines": ["local", "fine_tuned"], "client_samples": 10}}
    train(change(tiny, **sections), folder)
    return folder
