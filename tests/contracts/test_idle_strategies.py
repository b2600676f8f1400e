"""A strategy is reported as idle exactly where its run equals, bit for bit, the method's run without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedmllm.algorithms import AlgorithmConfig, Client, Holdings, Remark, build_algorithm, remarks
from fedmllm.algorithms.strategies.label_calibration import Calibration
from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.engine.observer import Observer
from fedmllm.run.resident import Resident
from fedmllm.types import Broadcast, Holding
from tiny_families import folder_of

RESIDENT = Resident()
SETTINGS: dict[str, Any] = {
    "model": {"name": folder_of("llava")},
    "federation": {"num_clients": 4, "clients_per_round": 3, "num_rounds": 1, "min_partition_size": 5},
    "training": {"batch_size": 1, "accumulation": 2},
    "evaluation": {"every": 0, "baselines": []},
    "engine": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains an experiment once and returns its folder and the remarks made at its start."""

    @cache
    def run(dataset: str, scenario: str, strategies: str) -> tuple[Path, Mapping[str, Remark]]:
        data = {"dataset": dataset, "num_train": 40, "num_test": 8, "check_images": False}
        remarks_made: list[Mapping[str, Remark]] = []
        values = SETTINGS | {"data": data, "federation": SETTINGS["federation"] | {"scenario": scenario}}
        values["algorithm"] = {"name": "fedavg", "strategies": json.loads(strategies)}
        folder = tmp_path_factory.mktemp("run") / "run"
        train(Experiment.parse(values), folder, resident=RESIDENT, report=False, observer=Observer(remarked=remarks_made.append))
        return folder, remarks_made[0]

    return run


@pytest.mark.parametrize(
    ("dataset", "scenario", "name", "parameters", "idle"),
    [
        ("digits-claims", "aligned-0.5", "feature_alignment", {}, False),
        ("digits-claims", "missing-0.4", "feature_alignment", {}, False),
        ("digits-claims", "cross-5:5", "feature_alignment", {}, True),
        ("digits-claims", "aligned-0.5", "feature_alignment", {"weight": 0.0}, True),
        ("digits-claims", "aligned-0.5", "modality_coverage", {}, True),
        ("digits-claims", "missing-0.4", "modality_coverage", {}, False),
        ("digits-claims", "missing-0.4", "modality_coverage", {"power": 0.0}, True),
        ("digits-claims", "cross-3:7", "modality_coverage", {}, False),
        ("digits-claims", "aligned-0.5", "label_calibration", {}, False),
        ("digits-claims", "aligned-0.5", "label_calibration", {"strength": 0.0}, True),
        ("digits-vqa", "aligned-0.5", "label_calibration", {}, True),
        ("digits-claims", "aligned-0.5", "adaptive_regularization", {"mu": 100.0}, False),
        ("digits-claims", "aligned-0.5", "adaptive_regularization", {"mu": 0.0}, True),
    ],
)
def test_only_an_idle_strategy_changes_no_bit(
    trained: Any, dataset: str, scenario: str, name: str, parameters: dict[str, float], idle: bool
) -> None:
    plain, said = trained(dataset, scenario, "[]")
    folder, remarked = trained(dataset, scenario, json.dumps([{"name": name, "parameters": parameters}]))
    before, after = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (plain, folder))
    assert said == {}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items()) == idle
    assert (name in remarked and remarked[name].idle) == idle
    result = json.loads((folder / "result.json").read_text())
    assert result["idle"] == [name] * idle
    assert result["remarks"] == {key: remark.text for key, remark in remarked.items()}


def holdings(*profiles: dict[str, int], options: bool | None = None, layers: int = 28) -> Holdings:
    return Holdings({f"c{i}": p for i, p in enumerate(profiles)}, options, tuple(f"m.layers.{i}.q.lora_A.weight" for i in range(layers)))


def remark(name: str, held: Holdings, **parameters: float) -> Remark | None:
    config = AlgorithmConfig.model_validate({"strategies": [{"name": name, "parameters": parameters}]})
    return remarks(config, held).get(name)


def test_a_window_that_skips_no_layer_is_reported_unless_it_was_requested() -> None:
    """A seventh of six layers rounds down to none; of seven layers it is one."""
    found = remark("adaptive_regularization", holdings(layers=6))
    assert found is not None
    assert not found.idle
    assert found.text.startswith("skip_fraction 0.143 of 6 layers rounds down to 0, so it regularizes every layer; set skip_layers")
    assert remark("adaptive_regularization", holdings(layers=7)) is None
    assert remark("adaptive_regularization", holdings(layers=6), skip_layers=1) is None
    assert remark("adaptive_regularization", holdings(layers=6), skip_layers=0) is None
    assert remark("adaptive_regularization", holdings(layers=6), skip_fraction=0.0) is None


def test_unknown_holdings_make_no_strategy_idle() -> None:
    """If one client does not report its modalities, nothing is claimed. If no client does, coverage has no effect."""
    some = holdings({"image": 3}, {})
    assert [remark(name, some) for name in ("feature_alignment", "modality_coverage", "label_calibration")] == [None] * 3
    nobody = remark("modality_coverage", holdings({}, {}))
    assert nobody is not None
    assert nobody.idle


def test_clients_with_equal_shares_of_modalities_get_equal_weights() -> None:
    assert remark("modality_coverage", holdings({"image": 2, "text": 4}, {"image": 5, "text": 10})) is not None
    assert remark("modality_coverage", holdings({"image": 2, "text": 4}, {"image": 5, "text": 11})) is None


def test_profiles_of_sites_are_self_reported(federation: FederatedData) -> None:
    assert all(profile for profile in federation.profiles.values())
    remarks_made = {"a": Holding(3, {"image": 3}), "b": Holding(1)}
    assert FederatedData(federation.dataset, {"a": (), "b": (), "c": ()}, 0, remarks_made).profiles == {"a": {"image": 3}, "b": {}, "c": {}}


def test_replacing_a_methods_own_calibration_is_reported() -> None:
    """It replaces the method's own calibration. With the same strength nothing changes."""
    held = Holdings({"a": {"image": 3}}, True, (), terms=(Calibration(1.0),))
    found = {strength: remark("label_calibration", held, strength=strength) for strength in (0.0, 0.5, 1.0)}
    assert {strength: said.idle for strength, said in found.items() if said} == {0.0: False, 0.5: False, 1.0: True}
    assert "replaces the method's own calibration, which has strength 1" in found[0.5].text  # type: ignore[union-attr]
    rules = []
    for strategies in ([], ["label_calibration"], [{"name": "label_calibration", "parameters": {"strength": 0.5}}]):
        method = build_algorithm(AlgorithmConfig.model_validate({"name": "calibrated_flexlora", "strategies": strategies}))
        rules.append(method.local_rule(Broadcast(0, {}), Client()).all_terms)
    assert rules == [(Calibration(1.0),), (Calibration(1.0),), (Calibration(0.5),)]
