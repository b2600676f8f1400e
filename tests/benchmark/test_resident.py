"""Runs one after another in one process, on the same resident model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedmllm.benchmark.resident as module
from fedmllm.benchmark.resident import Resident
from fedmllm.benchmark.run import train
from fedmllm.config import Experiment
from fedmllm.errors import FederationError

CHANGES: list[dict[str, Any]] = [
    {},
    {"algorithm": {"name": "flora"}},
    {"lora": {"connector": "full", "embeddings": "full", "dora": True}},
    {"data": {"num_train": 30}, "seed": 1},
    {"federation": {"heterogeneity": ["typos-1"]}, "engine": {"answers_only": False}},
    {},
]


def changed(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
    values = experiment.model_dump(mode="json")
    for name, section in changes.items():
        values[name] = values[name] | section if isinstance(section, dict) else section
    return Experiment.parse(values)


def test_it_ends_as_it_does_alone_whatever_ran_before(tiny: Experiment, tmp_path: Path) -> None:
    resident = Resident()
    for i, changes in enumerate(CHANGES):
        experiment = changed(tiny, changes)
        results = [train(experiment, tmp_path / f"{place}{i}", resident=held) for place, held in (("alone", None), ("after", resident))]
        assert results[0].scores == results[1].scores, changes
        alone, after = (load_file(tmp_path / f"{place}{i}" / "adapter" / "adapter_model.safetensors") for place in ("alone", "after"))
        assert all(torch.equal(after[name], tensor) for name, tensor in alone.items())
        assert after.keys() == alone.keys()


def test_what_is_alike_is_loaded_once(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, loads = Resident(), []
    for name in ("load", "load_model"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, real=real: loads.append(name) or real(*args))
    for i, changes in enumerate([{}, {"algorithm": {"name": "fedprox"}}, {"federation": {"scenario": "cross-5:5"}}]):
        train(changed(tiny, changes), tmp_path / str(i), resident=resident)
    assert loads == ["load", "load_model"]
    train(changed(tiny, {"seed": 5}), tmp_path / "seed", resident=resident)
    assert loads == ["load", "load_model", "load"]


def test_a_run_that_fails_leaves_the_model_as_it_was(tiny: Experiment, tmp_path: Path) -> None:
    resident = Resident()
    with resident.model(tiny) as (vlm, _):
        before = {name: tensor.clone() for name, tensor in vlm.model.get_base_model().state_dict().items() if "lora" not in name}
    bad = changed(tiny, {"training": {"learning_rate": 1e30}, "algorithm": {"name": "flora"}})
    with pytest.raises(FederationError):
        train(bad, tmp_path / "bad", resident=resident)
    with resident.model(tiny) as (vlm, _):
        after = {name: tensor for name, tensor in vlm.model.get_base_model().state_dict().items() if "lora" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
