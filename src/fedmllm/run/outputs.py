"""Writes the adapters of a run and their model cards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedmllm.algorithms import ServerState
from fedmllm.config import Experiment
from fedmllm.files import write_atomically
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.saved import save_adapter
from fedmllm.run.card import adapter_card
from fedmllm.run.results import RunResult
from fedmllm.types import Weights


def save_adapters(vlm: VisionLanguageModel, folder: Path, trained: ServerState, own: Mapping[str, Weights]) -> None:
    """Save the global adapter and, for a personalized method, each client's adapter.

    Args:
        vlm: the model.
        folder: the run folder.
        trained: the final state.
        own: the weights of the personalized models by client.
    """
    save_adapter(vlm, trained.weights, folder / "adapter", trained.base)
    for client, weights in own.items():
        (folder / "adapters").mkdir(exist_ok=True)
        save_adapter(vlm, weights, folder / "adapters" / client, trained.base)


def write_cards(folder: Path, result: RunResult, experiment: Experiment, torchvision: bool) -> None:
    """Write a model card next to each adapter of a run folder. ``torchvision`` says whether the model's processor needs it."""
    adapters = {"": folder / "adapter", **{path.name: path for path in sorted(folder.glob("adapters/*"))}}
    for client, adapter in adapters.items():
        write_atomically(adapter / "README.md", adapter_card(result, experiment, client, torchvision).encode())
