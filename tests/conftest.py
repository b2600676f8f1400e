"""Shared fixtures: the embedded model, small federations of the embedded data, and a plain run folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData, federate
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import attach_lora
from fedmllm.models.parts import LoraConfig
from fedmllm.models.settings import ModelConfig
from fedmllm.training.batches import Encoder
from tiny_families import folder_of, load

torch.set_num_threads(1)
# An example takes longer on a loaded machine; that is no failure.
settings.register_profile("without deadline", deadline=None)
settings.load_profile("without deadline")

TINY = {
    "data": {"dataset": "digits-claims", "num_train": 60, "num_test": 24},
    "federation": {"num_clients": 3, "clients_per_round": 2, "num_rounds": 2, "scenario": "missing-0.3", "min_partition_size": 10},
    "evaluation": {"every": 1, "baselines": []},
    "engine": {"device": "cpu"},
}


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    """An experiment of less than a second on a tiny model; few properties of a run depend on the model's size."""
    return Experiment.parse(TINY | {"model": {"name": folder_of("llava")}})


@pytest.fixture(scope="session")
def embedded() -> Experiment:
    """The same experiment on the embedded model."""
    return Experiment.parse(TINY)


@pytest.fixture(scope="session")
def base() -> VisionLanguageModel:
    """The embedded model without adapters. Tests must not change it."""
    return load_model(ModelConfig(), torch.device("cpu"))


@pytest.fixture
def vlm() -> VisionLanguageModel:
    """A tiny LLaVA with new adapters. Tests may change it."""
    return attach_lora(load("llava"), LoraConfig(), seed=0)


@pytest.fixture
def nano() -> VisionLanguageModel:
    """The embedded model with new adapters, for tests that need its size or its pretraining."""
    return attach_lora(load_model(ModelConfig(), torch.device("cpu")), LoraConfig(), seed=0)


@pytest.fixture
def encoder(vlm: VisionLanguageModel) -> Encoder:
    """Encodes for ``vlm`` with the modality-agnostic prompt."""
    return Encoder(vlm, "agnostic")


@pytest.fixture(scope="session")
def federation() -> FederatedData:
    """Three clients with missing modalities."""
    experiment = Experiment.parse(TINY)
    return federate(experiment.data, experiment.federation, experiment.seed)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets. Without it the test is skipped."""
    folder = os.environ.get("FEDMLLM_DATA")
    if not folder:
        pytest.skip("FEDMLLM_DATA names no folder of real datasets")
    return Path(folder).resolve()
