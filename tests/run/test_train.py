"""Complete runs: the folder's contents, equal runs, and resuming after a kill."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from fedmllm.algorithms import STRATEGIES
from fedmllm.algorithms.strategies import Strategy
from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData, federate
from fedmllm.data.prompts import to_messages
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.observer import Observer
from fedmllm.errors import ConfigError, DataError, ModelError, RunError
from fedmllm.evaluation.predictions import SIDE_BY_SIDE
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import adapted_layers, write_base, write_weights
from fedmllm.models.source import model_source
from fedmllm.run.card import adapter_card
from fedmllm.run.reader import Round, read_run
from fedmllm.run.results import SCORES, RunResult
from fedmllm.run.scoring import chat, merge, score_adapter
from fedmllm.run.stages import pooled
from fedmllm.types import Record, Sample
from scripted import cut_short


def change(experiment: Experiment, **sections: dict[str, Any]) -> Experiment:
    values = experiment.model_dump(mode="json")
    for name, section in sections.items():
        values[name] |= section
    return Experiment.parse(values)


@pytest.fixture(scope="module")
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


def outcome(folder: Path) -> RunResult:
    result = read_run(folder).result
    assert result is not None
    return result


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


def test_the_result_is_complete(finished: Path) -> None:
    record = json.loads((finished / "result.json").read_text())
    assert record["metric"] == "auc"
    assert set(record["scores"]) == set(SCORES)
    asked = {name: score for name, score in record["scores"].items() if score is not None}
    assert set(record["scores"]) - set(asked) == {"calibrated_local_mean", "calibrated_centralized"}
    assert all(0 <= score <= 1 for score in asked.values())
    # The three metrics are reported beside any headline, also for the clients' mean.
    assert all(set(SIDE_BY_SIDE) <= set(record["details"][name]) for name in asked if name != "ceiling")
    assert record["scores"]["local_mean"] == pytest.approx(sum(record["local"].values()) / 3)
    adapter = load_file(finished / "adapter" / "adapter_model.safetensors")
    sent = sum(tensor.nbytes for tensor in adapter.values())
    assert record["bytes_up"] == record["bytes_down"] == 3 * 2 * sent
    assert record["trainable_parameters"] * 4 == sent
    assert record["seconds"] > 0
    assert record["seed"] == 0
    assert {"fedmllm", "torch", "transformers", "peft"} <= set(record["versions"])
    assert outcome(finished).to_record() == record


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


def test_the_adapters_card_is_complete_and_has_no_local_paths(finished: Path) -> None:
    card, record = (finished / "adapter" / "README.md").read_text(), outcome(finished)
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "nano",
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["lora", "federated-learning"],
    }
    assert f"| federated | {record.scores['federated']:.3f} | {record.standard_errors['federated']:.3f} |" in body
    assert f"{record.trainable_parameters:,} trained parameters" in body
    assert "digits-claims, 3 clients" in body
    assert "All clients of this run were simulated on one machine." in body
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    loaded: dict[str, Any] = {}
    exec(code.replace("this folder", str(finished / "adapter")), loaded)
    assert dict(adapted_layers(loaded["model"]))
    settings = (finished / "adapter" / "adapter_config.json").read_text()
    for text in (card, settings):
        assert str(Path.home()) not in text
        assert str(Path(model_source("nano")).parent) not in text


def test_the_card_of_a_run_over_sites_says_so(finished: Path) -> None:
    experiment = Experiment.load(finished / "config.yaml")
    over_sites = experiment.model_copy(update={"engine": experiment.engine.model_copy(update={"server": Path("server.yaml")})})
    card = adapter_card(outcome(finished), over_sites)
    assert "The clients of this run were sites, which trained on their own machines." in card
    assert "simulated" not in card


def plain_logits(model: Any, source: str | Path, samples: Sequence[Sample]) -> torch.Tensor:
    """Logits of the letters A and B right after the prompt, one row per sample. Of our code only the prompt's wording is used."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(source)
    letters = processor.tokenizer.convert_tokens_to_ids(["A", "B"])
    rows = []
    for sample in samples:
        text = str(to_messages(sample, "agnostic")[0].parts[-1].value)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[prompt], images=[sample.content["image"]], return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**inputs).logits[0, -1, letters].double())
    return torch.stack(rows)


def score_in_plain_peft(folder: Path) -> tuple[torch.Tensor, float]:
    """Logits and AUC of a run's adapter with only Transformers and PEFT."""
    from peft import PeftModel
    from sklearn.metrics import roc_auc_score
    from transformers import AutoModelForImageTextToText

    source, test = model_source("nano"), load_test_split(folder)
    base = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32)
    logits = plain_logits(PeftModel.from_pretrained(base, str(folder / "adapter")).eval(), source, test)
    return logits, float(roc_auc_score([sample.label for sample in test], logits.softmax(1)[:, 1].numpy()))


def load_test_split(folder: Path) -> Sequence[Sample]:
    experiment = Experiment.load(folder / "config.yaml")
    return federate(experiment.data, experiment.federation, 0).dataset.test


def test_the_adapter_gives_the_same_predictions_in_plain_peft(finished: Path) -> None:
    assert score_in_plain_peft(finished)[1] == pytest.approx(outcome(finished).scores["federated"], abs=1e-9)


@pytest.mark.parametrize("method", ["flora", "fedex_lora"])
def test_the_adapter_includes_changes_of_the_frozen_weights(
    embedded: Experiment, tmp_path: Path, nano: VisionLanguageModel, method: str
) -> None:
    """The run's final model has changed frozen weights. The saved adapter gives the same results on the published ones."""
    experiment = change(embedded, algorithm={"name": method}, evaluation={"every": 0})
    expected = train(experiment, tmp_path / "run").scores["federated"]
    state = RunStore(tmp_path / "run").load_state("federated")
    assert state is not None
    assert state.base
    write_base(nano, state.base)
    write_weights(nano.model, state.weights)
    logits, score = score_in_plain_peft(tmp_path / "run")
    torch.testing.assert_close(
        logits, plain_logits(nano.model.eval(), model_source("nano"), load_test_split(tmp_path / "run")), atol=1e-4, rtol=1e-4
    )
    assert score == pytest.approx(expected, abs=1e-9)
    assert score_adapter(tmp_path / "run")[1]["score"] == pytest.approx(expected, abs=1e-9)
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] > 8
    assert settings["lora_alpha"] / settings["r"] == 2


@pytest.fixture(scope="module")
def personalized(tiny: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a personalized method, with scores for each client's models."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    sections = {"algorithm": {"name": "ditto"}, "evaluation": {"every": 1, "baselines": ["local", "fine_tuned"], "client_samples": 10}}
    train(change(tiny, **sections), folder)
    return folder


CLIENTS = ["client-00", "client-01", "client-02"]


def test_a_personalized_run_has_each_client_s_models(personalized: Path) -> None:
    assert sorted(path.name for path in (personalized / "adapters").iterdir()) == CLIENTS
    stages = {path.stem for path in (personalized / "checkpoints").glob("*.safetensors")}
    assert stages == {"federated", *(f"{kind}-{client}" for kind in ("local", "fine_tuned") for client in CLIENTS)}
    rounds = [line for line in read_run(personalized).lines if isinstance(line, Round)]
    took_part = {client for line in rounds if line.stage == "federated" for client in line.clients}
    kept = list((personalized / "checkpoints" / "federated-clients").glob("*/*.safetensors"))
    assert {path.parent.name for path in kept} == took_part
    assert {path.stem for path in kept} <= {"0", "1"}
    assert [line.stage for line in rounds].count("fine_tuned-client-00") == 1


def test_a_personalized_run_scores_each_client_s_own_model(personalized: Path) -> None:
    result = outcome(personalized)
    assert result.personalized
    scores = [score_adapter(personalized / "adapters" / client)[1]["score"] for client in CLIENTS]
    assert result.scores["federated"] == pytest.approx(mean(scores), abs=1e-9)
    assert result.standard_errors["federated"] == pytest.approx(stdev(scores) / 3**0.5, abs=1e-9)
    assert result.details["federated"]["num_samples"] == 3 * 24
    assert list(result.details) == ["federated", "local_mean"]
    assert {f"fine_tuned-{client}" for client in CLIENTS} < set(result.seconds_by_stage)


def test_each_clients_models_are_scored_on_its_kind_of_samples(personalized: Path) -> None:
    clients = outcome(personalized).clients
    assert {model: list(scores) for model, scores in clients.items()} == dict.fromkeys(("federated", "local", "fine_tuned"), CLIENTS)
    assert all(0 <= score <= 1 for scores in clients.values() for score in scores.values())
    report = (personalized / "report.html").read_text()
    assert "Each client on its own kind of samples" in report
    assert "fine-tuned mean" in report


def test_the_memory_of_the_aggregation_is_recorded(finished: Path, personalized: Path) -> None:
    for folder in (finished, personalized):
        rounds, weights = read_run(folder).rounds, load_file(folder / "adapter" / "adapter_model.safetensors")
        # A running mean in float64 takes twice the bytes of an adapter, for any number of clients.
        assert {line.bytes_held for line in rounds} == {2 * sum(tensor.nbytes for tensor in weights.values())}


def test_evaluate_gives_the_run_s_own_score(finished: Path) -> None:
    expected = outcome(finished).scores["federated"]
    for path in (finished, finished / "adapter"):
        metric, scores = score_adapter(path)
        assert (metric, scores["score"]) == ("auc", pytest.approx(expected, abs=1e-9))


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the embedded model's shapes and other weights."""
    folder = Path(shutil.copytree(model_source("nano"), tmp_path_factory.mktemp("models") / "other"))
    weights = load_file(folder / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_loads_on_its_own_base_model_only(finished: Path, other_base: Path, tmp_path: Path) -> None:
    """Also if the experiment is given, or only the adapter's folder."""
    override = f"model.name={other_base}"
    named = tmp_path / "named.yaml"
    named.write_text(change(Experiment.load(finished / "config.yaml").with_fingerprint(None), model={"name": str(other_base)}).to_yaml())
    commands: list[Callable[[], object]] = [
        lambda: score_adapter(finished, None, [override]),
        lambda: score_adapter(finished / "adapter", None, [override]),
        lambda: score_adapter(finished, named),
        lambda: chat(finished, named),
        lambda: merge(finished, tmp_path / "merged", None, [override]),
    ]
    for command in commands:
        with pytest.raises(ModelError, match=r"does not match model\.fingerprint"):
            command()
    assert not (tmp_path / "merged").exists()
    assert score_adapter(finished, None, [override], force=True)[1] != score_adapter(finished)[1]


def test_a_run_resumes_on_its_own_base_model_only(tiny: Experiment, other_base: Path, tmp_path: Path) -> None:
    """The content of the model's folder changed after the run started."""
    base = Path(shutil.copytree(model_source("nano"), tmp_path / "base"))
    experiment = change(tiny, model={"name": str(base)})

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(experiment, tmp_path / "run", observer=Observer(round_done=stop))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    shutil.copy(other_base / "model.safetensors", base)
    with pytest.raises(RunError, match="is not the model that the run started with"):
        train(experiment, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before
    train(experiment, tmp_path / "run", resume=True, force=True)
    score_adapter(tmp_path / "run")


def test_an_adapter_without_experiment_is_refused(finished: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "elsewhere"
    adapter.mkdir()
    with pytest.raises(RunError, match="name the experiment with --experiment"):
        score_adapter(adapter)


def test_a_used_folder_is_not_overwritten(finished: Path, tiny: Experiment) -> None:
    with pytest.raises(RunError, match="is not empty"):
        train(tiny, finished)


def test_resuming_with_other_settings_is_refused(finished: Path) -> None:
    changed = change(Experiment.load(finished / "config.yaml"), training={"learning_rate": 0.5})
    with pytest.raises(RunError, match=r"training\.learning_rate: 0\.001 and 0\.5"):
        train(changed, finished, resume=True)


@pytest.mark.parametrize("file", ["train.csv", "test.csv", "a.png"])
def test_resuming_with_other_data_is_refused(file: str, tmp_path: Path) -> None:
    """A row of either split or a picture changes between two sessions. The run's manifest does not change."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("p,t,a\n" + "".join(f"a.png,{split} {i},{'yes' if i % 2 else 'no'}\n" for i in range(8)))
    columns = {"image": "p", "text": "t", "answer": "a"}
    options = {"train": "train.csv", "test": "test.csv", "columns": columns, "question": "Is it?", "choices": ["no", "yes"]}
    experiment = Experiment.parse(
        {
            "data": {"dataset": "csv", "root": str(tmp_path), "options": options},
            "federation": {"num_clients": 1, "clients_per_round": 1, "num_rounds": 2, "partition": "iid"},
            "evaluation": {"every": 0, "baselines": []},
            "engine": {"device": "cpu"},
        }
    )

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(experiment, tmp_path / "run", observer=Observer(round_done=stop))
    before, content = (tmp_path / "run" / "manifest.json").read_bytes(), (tmp_path / file).read_bytes()
    if file == "a.png":
        Image.new("RGB", (8, 8), "blue").save(tmp_path / "a.png")
    else:
        (tmp_path / file).write_text((tmp_path / file).read_text().replace(" 5,", " five,"))
    expected = (
        r"16 sample\(s\) differ"
        if file == "a.png"
        else r"1 sample\(s\) differ; .*\n  - (client-00|test): (train|test)-7 has different content$"
    )
    with pytest.raises(RunError, match=expected):
        train(experiment, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    (tmp_path / file).write_bytes(content)
    train(experiment, tmp_path / "run", resume=True)


def test_resuming_a_finished_run_changes_nothing(finished: Path) -> None:
    before = comparable(finished)
    seen: list[Record] = []
    train(Experiment.load(finished / "config.yaml"), finished, name="demo", resume=True, observer=Observer(round_done=seen.append))
    assert seen == []
    assert comparable(finished) == before


def test_nothing_to_resume(tmp_path: Path, tiny: Experiment) -> None:
    with pytest.raises(RunError, match="there is no run to resume"):
        train(tiny, tmp_path / "none", resume=True)


def test_one_client_with_all_data_equals_centralized_bit_for_bit(tmp_path: Path, tiny: Experiment) -> None:
    alone = change(
        tiny,
        federation={"num_clients": 1, "clients_per_round": 1, "num_rounds": 3},
        evaluation={"baselines": ["centralized"]},
        data={"num_train": 30},
    )
    result = train(alone, tmp_path / "run")
    federated, centralized = (load_file(tmp_path / "run" / "checkpoints" / f"{name}.safetensors") for name in ("federated", "centralized"))
    assert all(torch.equal(federated[name], centralized[name]) for name in federated)
    assert any(tensor.any() for name, tensor in federated.items() if "lora_B" in name)
    assert result.scores["federated"] == result.scores["centralized"]


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


def test_baselines_visit_each_sample_as_often_as_the_federation(tmp_path: Path, tiny: Experiment) -> None:
    """Under a buffered schedule the clients of a round are those in the buffer, not those at work."""
    federation = {"num_clients": 4, "clients_per_round": 4, "num_rounds": 4, "min_partition_size": 1}
    for schedule, rounds in ({"name": "synchronous"}, 4), ({"name": "buffered", "parameters": {"buffer": 2}}, 2):
        sections = {"federation": federation, "schedule": schedule, "evaluation": {"every": 0, "baselines": ["centralized"]}}
        train(change(tiny, **sections), tmp_path / str(rounds), report=False)
        assert len(RunStore(tmp_path / str(rounds)).records("centralized")) == rounds


def test_calibrated_baselines_are_plain_training_with_calibration(tmp_path: Path, tiny: Experiment) -> None:
    """A federation with one client and ``label_calibration`` equals calibrated centralized and calibrated local training."""
    alone = change(
        tiny,
        federation={"num_clients": 1, "clients_per_round": 1, "num_rounds": 2},
        evaluation={"baselines": ["local", "calibrated_local", "calibrated_centralized"]},
        data={"num_train": 30},
        algorithm={"name": "fedavg", "strategies": [{"name": "label_calibration", "parameters": {"strength": 0.5}}]},
    )
    result = train(alone, tmp_path / "run")
    names = ("federated", "calibrated_centralized", "calibrated_local-client-00", "local-client-00")
    federated, *calibrated, plain_logits = (load_file(tmp_path / "run" / "checkpoints" / f"{name}.safetensors") for name in names)
    for baseline in calibrated:
        assert all(torch.equal(federated[name], baseline[name]) for name in federated)
    assert not all(torch.equal(federated[name], plain_logits[name]) for name in federated)
    assert result.scores["calibrated_centralized"] == result.scores["calibrated_local_mean"] == result.scores["federated"]
    assert result.local == {"client-00": result.scores["local_mean"]}
    report, card = (tmp_path / "run" / "report.html").read_text(), (tmp_path / "run" / "adapter" / "README.md").read_text()
    for text in ("calibrated local mean", "calibrated centralized", "balanced accuracy"):
        assert text in report
        assert text in card


def test_with_one_client_the_global_prior_is_the_clients_prior(tmp_path: Path, tiny: Experiment) -> None:
    ended = []
    for given in (False, True):
        strategy = {"name": "label_calibration", "parameters": {"global_prior": given}}
        alone = change(
            tiny,
            federation={"num_clients": 1, "clients_per_round": 1},
            data={"num_train": 30},
            algorithm={"name": "fedavg", "strategies": [strategy]},
        )
        train(alone, tmp_path / str(given))
        ended.append(load_file(tmp_path / str(given) / "checkpoints" / "federated.safetensors"))
    assert all(torch.equal(ended[0][name], ended[1][name]) for name in ended[0])


def test_pooling_keeps_every_sample_once(federation: FederatedData) -> None:
    ((name, samples),) = pooled(federation.clients).items()
    assert name == "client-00"
    assert sorted(s.id for s in samples) == [s.id for s in samples] == sorted(s.id for c in federation.clients.values() for s in c)


def test_seeds_decide_the_outcome(tmp_path: Path, tiny: Experiment) -> None:
    values = tiny.model_dump(mode="json")
    folders = {name: tmp_path / name for name in ("first", "again", "other")}
    for name, folder in folders.items():
        train(Experiment.parse(values | {"seed": 1 if name == "other" else 0}), folder, name="x")
    first, again, other = (comparable(folder) for folder in folders.values())
    assert first == again
    assert first != other


def comparable(folder: Path) -> tuple[Any, ...]:
    """Everything that must not depend on interruptions, which is all but times."""
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in [result, *lines]:
        for key in ("seconds", "seconds_by_stage"):
            record.pop(key, None)
    kept = [
        path for pattern in ("adapter*/**/*.safetensors", "checkpoints/**/*.safetensors", "manifest.json") for path in folder.glob(pattern)
    ]
    return result, lines, [(str(path.relative_to(folder)), path.read_bytes()) for path in sorted(kept)]


@pytest.mark.parametrize("method", ["scaffold", "ditto"])
def test_a_run_interrupted_after_and_within_a_round_ends_bit_for_bit_the_same(
    tiny: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Methods whose clients keep state. The run stops between rounds, and then before a checkpoint is written."""
    experiment = change(tiny, algorithm={"name": method}, federation={"num_rounds": 3}, evaluation={"every": 0, "client_samples": 5})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(experiment, whole, name="x")

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(experiment, parts, name="x", observer=Observer(round_done=stop))
    with cut_short(monkeypatch, 0):
        train(experiment, parts, name="x", resume=True)
    assert count_lines(parts) == 3
    assert list((parts / "checkpoints" / "federated-clients").glob("*/2.safetensors"))
    train(experiment, parts, name="x", resume=True)
    assert count_lines(parts) == 3
    assert comparable(parts) == comparable(whole)


RESUMED = """
data: {dataset: digits-claims, num_train: 64, num_test: 16}
federation: {num_clients: 4, clients_per_round: 2, num_rounds: 14, scenario: missing-0.3}
lora: {dropout: 0.1}
evaluation: {every: 3, baselines: [zero_shot, centralized]}
engine: {device: cpu}
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    """Five SIGKILLs, each at a moment between a session's first line and the end of the run."""
    (tmp_path / "demo.yaml").write_text(RESUMED)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(tmp_path, whole).wait() == 0
    rng, kills = random.Random(0), 0
    while True:
        process = start(tmp_path, parts, *(["--resume"] if (parts / "config.yaml").exists() else []))
        if kills < 5:
            wait_for_progress(process, parts)
            time.sleep(rng.uniform(0, 0.35))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        code = process.wait()
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            break
    assert kills == 5
    assert comparable(parts) == comparable(whole)


def start(folder: Path, output: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedmllm", "train", "demo.yaml", "--output", str(output), *more]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_progress(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait until the process has trained a round in this session or has ended."""
    lines = count_lines(folder)
    while process.poll() is None and count_lines(folder) <= lines:
        time.sleep(0.005)


def count_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
