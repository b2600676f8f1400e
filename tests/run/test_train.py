"""Complete runs: the folder's contents, the settings that take effect, and equal runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedmllm.algorithms import STRATEGIES
from fedmllm.algorithms.strategies import Strategy
from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.errors import ConfigError, DataError, ModelError
from fedmllm.run.reader import read_run
from fedmllm.run.scoring import score_adapter
from trained_runs import change, comparable, outcome


def test_the_folder_is_complete(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "predictions.json",
        "result.json",
        "adapter",
        "checkpoints",
        "report.html",
    }
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (finished / "adapter").iterdir()}
    stages = {path.stem for path in (finished / "checkpoints").iterdir()}
    assert stages == {"federated", "centralized", "local-client-00", "local-client-01", "local-client-02"}


@pytest.mark.parametrize("method", ["calibrated_flexlora", "flora", "fedsa_lora"])
def test_connector_and_embeddings_are_trained_and_sent(tiny: Experiment, tmp_path: Path, method: str) -> None:
    """Clients train one by one, and pictures are encoded every time. Both parts move, are counted, are sent, and are saved with the adapter."""
    extra = {"connector": "full", "embeddings": "full"}
    result = train(change(tiny, lora=extra, algorithm={"name": method}, evaluation={"baselines": []}), tmp_path / "run")
    assert result.trained == ["decoder, LoRA on attention", "connector", "embeddings"]
    assert result.trainable_parameters == sum(result.parts[name] for name in result.trained)
    folder = tmp_path / "run" / ("adapters/client-00" if method == "fedsa_lora" else "adapter")
    held = load_file(folder / "adapter_model.safetensors")
    whole = [name for name in held if "lora_" not in name]
    assert sum(held[name].numel() for name in whole) == result.parts["connector"] + result.parts["embeddings"]
    frozen = load_file(Path(tiny.model.name) / "model.safetensors")
    moved = [name for name in whole if any(t.shape == held[name].shape and torch.equal(t.float(), held[name]) for t in frozen.values())]
    assert moved == []
    sent = 4 * sum(held[name].numel() for name in whole)
    assert result.bytes_up > 2 * sent
    if method != "fedsa_lora":
        assert score_adapter(tmp_path / "run")[1]["score"] == pytest.approx(result.scores["federated"])
    assert "connector; embeddings: " in (folder / "README.md").read_text()


def test_changed_copies_of_the_test_split_are_scored(tiny: Experiment, tmp_path: Path) -> None:
    result = train(change(tiny, evaluation={"tested": ["image", "text", "image+text", "typos-1:0"]}), tmp_path / "run")
    assert list(result.tested) == ["image", "text", "image+text", "typos-1:0"]
    for unchanged in ("image+text", "typos-1:0"):
        assert result.tested[unchanged]["score"] == result.scores["federated"]
    assert result.tested["image"]["score"] != result.scores["federated"]
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Tested on" in report
    assert outcome(tmp_path / "run") == result


def test_empty_copies_of_the_test_split_are_refused_before_anything_is_written(tiny: Experiment, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="audio leaves no test sample any content"):
        train(change(tiny, evaluation={"tested": ["audio"]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_modality_the_model_does_not_read_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    rows = [{"sound": "a.wav", "note": f"n{i}", "kind": "xy"[i % 2]} for i in range(40)]
    (tmp_path / "train").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"audio": "sound", "text": "note", "answer": "kind"}
    data = {"dataset": "jsonl", "root": tmp_path, "options": {"columns": columns, "question": "Which?", "choices": ["x", "y"]}}
    with pytest.raises(ModelError, match="samples hold audio"):
        train(Experiment.parse({"data": data, "federation": {"num_clients": 2}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_test_split_is_scored_once_at_the_end(finished: Path) -> None:
    """Progress and every choice use the validation split."""
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    federated = [row for row in rows if row["stage"] == "federated"]
    assert [row["score"] is None for row in federated] == [True] * (len(federated) - 1) + [False]
    assert [row["validation"] is None for row in federated] == [True, False, False]
    assert outcome(finished).validation == federated[-1]["validation"]
    manifest = json.loads((finished / "manifest.json").read_text())
    assert federated[-1]["validation"]["num_samples"] == manifest["validation"]["num_samples"] == manifest["test"]["num_samples"]
    ids = [{sample["id"] for sample in manifest[split]["samples"]} for split in ("validation", "test")]
    assert not ids[0] & ids[1]
    other = [row for row in rows if row["stage"] not in ("federated", "zero_shot")]
    assert all(row["validation"] is None for row in other)


def test_the_memory_of_the_aggregation_is_recorded(finished: Path, personalized: Path) -> None:
    for folder in (finished, personalized):
        rounds, weights = read_run(folder).rounds, load_file(folder / "adapter" / "adapter_model.safetensors")
        # A running mean in float64 takes twice the bytes of an adapter, for any number of clients.
        assert {line.bytes_held for line in rounds} == {2 * sum(tensor.nbytes for tensor in weights.values())}


def test_a_strategy_for_a_wording_is_listed_if_the_wording_is_used(
    tmp_path: Path, tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused beside another wording. The modality-agnostic prompt is such a strategy."""

    @dataclass(frozen=True)
    class Neutral(Strategy):
        wording = "neutral"

    monkeypatch.setitem(STRATEGIES, "neutral_prompt", Neutral)
    both = {"agnostic": ["agnostic_prompt"], "neutral": ["neutral_prompt"], "specific": []}
    for prompt, listed in both.items():
        experiment = change(tiny, data={"prompt": prompt})
        assert train(experiment, tmp_path / prompt, report=False).strategies == listed
    with pytest.raises(ConfigError, match=r"algorithm.strategies has neutral_prompt, data.prompt is agnostic; change one of them"):
        change(tiny, algorithm={"name": "fedavg", "strategies": ["neutral_prompt"]})


@pytest.mark.slow
def test_seeds_decide_the_outcome(tmp_path: Path, tiny: Experiment) -> None:
    values = tiny.model_dump(mode="json")
    folders = {name: tmp_path / name for name in ("first", "again", "other")}
    for name, folder in folders.items():
        train(Experiment.parse(values | {"seed": 1 if name == "other" else 0}), folder, name="x")
    first, again, other = (comparable(folder) for folder in folders.values())
    assert first == again
    assert first != other
