"""Several runs in one process, on the same resident model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fedmllm.run.resident as module
from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.data.federated import spread
from fedmllm.errors import FederationError
from fedmllm.models.encoding import Encoded
from fedmllm.models.source import NANO_FOLDER
from fedmllm.run.resident import Resident
from fedmllm.training.batches import Encoder

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


@pytest.mark.slow
def test_a_run_ends_the_same_after_other_runs(tiny: Experiment, tmp_path: Path) -> None:
    resident = Resident()
    for i, changes in enumerate(CHANGES):
        experiment = changed(tiny, changes)
        results = [
            train(experiment, tmp_path / f"{place}{i}", resident=held, report=False)
            for place, held in (("alone", None), ("after", resident))
        ]
        assert results[0].scores == results[1].scores, changes
        alone, after = (load_file(tmp_path / f"{place}{i}" / "adapter" / "adapter_model.safetensors") for place in ("alone", "after"))
        assert all(torch.equal(after[name], tensor) for name, tensor in alone.items())
        assert after.keys() == alone.keys()


def test_equal_models_and_data_are_loaded_once(tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, loads = Resident(), []
    for name in ("load", "load_model"):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, name=name, real=real: loads.append(name) or real(*args))
    for i, changes in enumerate([{}, {"algorithm": {"name": "fedprox"}}, {"federation": {"scenario": "cross-5:5"}}]):
        train(changed(tiny, changes), tmp_path / str(i), resident=resident, report=False)
    assert loads == ["load", "load_model"]
    train(changed(tiny, {"seed": 5}), tmp_path / "seed", resident=resident, report=False)
    assert loads == ["load", "load_model", "load"]


def test_a_failed_run_leaves_the_model_unchanged(tiny: Experiment, tmp_path: Path) -> None:
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


SPLITS: list[dict[str, Any]] = [
    {"scenario": f"aligned-{alpha}", "heterogeneity": [part]}
    for part in ("misaligned-0.5", "typos-0.5@client", "blur-0.5@client")
    for alpha in (5.0, 0.5)
] + [
    {"heterogeneity": ["misaligned-0.5"], "protocol": "reference"},
    {"heterogeneity": ["misaligned-0.5"], "num_clients": 4},
    {"heterogeneity": ["misaligned-1"], "scenario": "missing-0.3", "partition": "iid"},
]


def same_encoding(a: Encoded, b: Encoded) -> bool:
    """Equal tokens, and equal pixels or keys of their features."""
    return torch.equal(a.input_ids, b.input_ids) and a.picture == b.picture


def test_no_split_gets_encoded_samples_of_another(tiny: Experiment) -> None:
    """100 samples in many splits keep their ids. Each is encoded as if nothing had been kept."""
    resident = Resident()
    for federation in SPLITS:
        experiment = changed(tiny, {"data": {"num_train": 100}, "federation": federation})
        data = spread(resident.dataset(experiment), experiment.federation, experiment.seed)
        with resident.model(experiment):
            kept, alone = resident.encoder(experiment), Encoder(resident._plain(experiment), "agnostic")
            wrong = [s.id for samples in data.clients.values() for s in samples if not same_encoding(kept(s), alone(s))]
        assert wrong == [], federation


def test_a_cell_ends_the_same_after_a_cell_with_another_split(tiny: Experiment, tmp_path: Path) -> None:
    """misaligned-0.5 takes texts from samples of the same client, so they depend on the split."""
    resident, adapters = Resident(), {}
    for alpha in (5.0, 0.5):
        experiment = changed(tiny, {"federation": {"scenario": f"aligned-{alpha}", "heterogeneity": ["misaligned-0.5"], "num_rounds": 1}})
        for place, held in (("alone", None), ("after", resident)):
            train(experiment, tmp_path / f"{place}-{alpha}", resident=held, report=False)
            adapters[place] = load_file(tmp_path / f"{place}-{alpha}" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapters["after"][name], tensor) for name, tensor in adapters["alone"].items())


def test_encoded_samples_are_shared_by_all_splits(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal samples are encoded once, whatever the settings around them."""
    resident, encoded = Resident(), []
    real = Encoder._encoded
    monkeypatch.setattr(Encoder, "_encoded", lambda self, sample: encoded.append(sample.id) or real(self, sample))
    for federation in ({"scenario": "aligned"}, {"scenario": "aligned-5.0"}, {"scenario": "aligned", "num_clients": 4}):
        experiment = changed(tiny, {"federation": federation})
        data = spread(resident.dataset(experiment), experiment.federation, experiment.seed)
        encoder = resident.encoder(experiment)
        for samples in data.clients.values():
            list(map(encoder, samples))
    assert len(encoded) == 60


def own_files(root: Path, tiny: Experiment) -> Experiment:
    """Twelve pictures with texts."""
    rows = [{"i": f"{k}.png", "t": f"text {k}", "a": "xy"[k % 2]} for k in range(12)]
    for row in rows:
        Image.new("RGB", (9, 9), "red").save(root / row["i"])
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train": "train.jsonl", "columns": {"image": "i", "text": "t", "answer": "a"}, "question": "Which?", "choices": ["x", "y"]}
    return changed(tiny, {"data": {"dataset": "jsonl", "root": str(root), "num_train": None, "num_test": None, "options": options}})


def test_data_that_changed_on_disk_are_read_again(tiny: Experiment, tmp_path: Path) -> None:
    """A row and a picture's pixels change, as may happen during a worker's lifetime of weeks."""
    experiment, resident = own_files(tmp_path, tiny), Resident()
    first = resident.dataset(experiment)
    assert resident.dataset(experiment) is first
    before = {sample.id: resident.encoder(experiment)(sample) for sample in (*first.train, *first.test)}
    rows = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(rows.replace("text 3", "another text"))
    Image.new("RGB", (9, 9), "blue").save(tmp_path / "5.png")
    os.utime(tmp_path / "5.png", ns=(1, 1))
    second = resident.dataset(experiment)
    after = {sample.id: resident.encoder(experiment)(sample) for sample in (*second.train, *second.test)}
    assert {name for name in before if not same_encoding(before[name], after[name])} == {"train-4", "train-6"}


def test_a_model_that_changed_on_disk_is_loaded_again(tiny: Experiment, tmp_path: Path) -> None:
    folder, resident = tmp_path / "model", Resident()
    shutil.copytree(NANO_FOLDER, folder)
    experiment = changed(tiny, {"model": {"name": str(folder)}})
    first = resident._plain(experiment)
    assert resident._plain(experiment) is first
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    second = resident._plain(experiment)
    assert torch.equal(second.model.get_input_embeddings().weight, 2 * first.model.get_input_embeddings().weight)
