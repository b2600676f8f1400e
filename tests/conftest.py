"""Shared fixtures: the embedded model, small federations of the embedded data, a plain run folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData, federate
from fedmllm.models.load import ModelConfig, VisionLanguageModel, load_model
from fedmllm.models.lora import attach_lora
from fedmllm.models.parts import LoraConfig
from fedmllm.training.batches import Encoder
from tiny_families import folder_of, load

torch.set_num_threads(1)

TINY = {
    "data": {"dataset": "digits-claims", "num_train": 60, "num_test": 24},
    "federation": {"num_clients": 3, "clients_per_round": 2, "num_rounds": 2, "scenario": "missing-0.3", "min_partition_size": 10},
    "evaluation": {"every": 1, "baselines": []},
    "engine": {"device": "cpu"},
}


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    """An experiment of less than a second: what a run does hardly ever depends on how large its model is."""
    return Experiment.parse(TINY | {"model": {"name": folder_of("llava")}})


@pytest.fixture(scope="session")
def embedded() -> Experiment:
    """The same on the embedded model."""
    return Experiment.parse(TINY)


@pytest.fixture(scope="session")
def base() -> VisionLanguageModel:
    """The embedded model without adapters. Tests must leave it as it is."""
    return load_model(ModelConfig(), torch.device("cpu"))


@pytest.fixture
def vlm() -> VisionLanguageModel:
    """A tiny LLaVA with fresh adapters of its own. Tests may change it."""
    return attach_lora(load("llava"), LoraConfig(), seed=0)


@pytest.fixture
def nano() -> VisionLanguageModel:
    """The embedded model with fresh adapters of its own, for what needs its size or what it has learned."""
    return attach_lora(load_model(ModelConfig(), torch.device("cpu")), LoraConfig(), seed=0)


@pytest.fixture
def encoder(vlm: VisionLanguageModel) -> Encoder:
    """Encodes for ``vlm`` with the modality-agnostic prompt."""
    return Encoder(vlm, "agnostic")


@pytest.fixture(scope="session")
def federation() -> FederatedData:
    """Three clients that miss modalities."""
    experiment = Experiment.parse(TINY)
    return federate(experiment.data, experiment.federation, experiment.seed)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets; the test is skipped without it."""
    folder = os.environ.get("FEDMLLM_DATA")
    if not folder:
        pytest.skip("FEDMLLM_DATA names no folder of real datasets")
    return Path(folder).resolve()
