"""The models of the contract suites: the embedded one, and a tiny one of each architecture."""

from __future__ import annotations

import copy
import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from fedmllm import factors
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import trainable
from fedmllm.models.settings import ModelConfig
from minicpmv_stand_in import stand_in
from tiny_models import RECIPES, make

KINDS = ["nano", *RECIPES]
WITH_REMOTE = [*KINDS, "minicpmv"]
"""These and models whose code comes with their weights, as a stand-in with the same interface."""
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def folder_of(kind: str) -> str:
    """A model's folder, created once for all tests of this process."""
    if kind == "nano":
        return kind
    _FOLDERS.append(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
    make(kind, Path(_FOLDERS[-1].name))
    return _FOLDERS[-1].name


@functools.cache
def _loaded(kind: str) -> VisionLanguageModel:
    return load_model(ModelConfig(name=folder_of(kind)), torch.device("cpu"))


def load(kind: str) -> VisionLanguageModel:
    """A newly loaded model, which the caller may change. Its weights are copies of those read once."""
    if kind == "minicpmv":
        return stand_in()
    vlm = _loaded(kind)
    return replace(vlm, model=copy.deepcopy(vlm.model), originals={}, beside={})


def stirred(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """The model with adapters that have an effect (a new B is zero). Other trained parts are changed slightly."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in trainable(vlm.model):
            if not factors.is_a(name):
                weight.add_(torch.randn(weight.shape, generator=generator) / 8)
    return vlm
