"""The use of a trained adapter: scores, answers and merged models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fedmllm.config import Experiment
from fedmllm.data.federated import load
from fedmllm.errors import DataError, ModelError, RunError
from fedmllm.evaluation.evaluate import predict
from fedmllm.models.load import load_model
from fedmllm.models.settings import ModelConfig
from fedmllm.run.scoring import Adapter, chat, load_adapter_of, merge, score_adapter
from fedmllm.training.batches import Encoder
from fedmllm.types import Modality
from trained_runs import change, outcome


def test_evaluate_gives_the_run_s_own_score(finished: Path) -> None:
    expected = outcome(finished).scores["federated"]
    for path in (finished, finished / "adapter"):
        metric, scores = score_adapter(path)
        assert (metric, scores["score"]) == ("auc", pytest.approx(expected, abs=1e-9))


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


def test_an_adapter_without_experiment_is_refused(finished: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "elsewhere"
    adapter.mkdir()
    with pytest.raises(RunError, match="name the experiment with --experiment"):
        score_adapter(adapter)


@pytest.fixture(scope="module")
def adapter(finished: Path) -> Adapter:
    return load_adapter_of(finished)


def test_an_adapter_scores_its_own_test_split_or_another_dataset(finished: Path, adapter: Adapter) -> None:
    scores = adapter.evaluate()
    assert scores["score"] == pytest.approx(outcome(finished).scores["federated"], abs=1e-9)
    dataset = load(adapter.experiment.data, adapter.experiment.seed)
    assert adapter.score(dataset) == scores
    # With the other option as the correct answer, every pair is ranked the other way round.
    swapped = [replace(s, answer=s.options[1 - s.label]) for s in dataset.test]
    assert adapter.score(replace(dataset, test=tuple(swapped)))["score"] == pytest.approx(1 - scores["score"])


def test_overrides_change_the_data_and_the_seed_of_a_score(finished: Path) -> None:
    assert score_adapter(finished, None, ["data.num_test=10"])[1]["num_samples"] == 10
    assert score_adapter(finished, None, ["seed=1"])[1] != score_adapter(finished)[1]


def test_a_test_split_that_has_no_score_is_refused(finished: Path) -> None:
    with pytest.raises(DataError, match="the test split: the AUC needs samples of both classes"):
        score_adapter(finished, None, ["data.num_test=1"])


def test_an_adapter_of_an_unknown_method_is_used_like_any_other(finished: Path, tmp_path: Path) -> None:
    """The adapter does not depend on the method, which may be in a script that is not imported here, nor on the clients' ranks."""
    values = yaml.safe_load((finished / "config.yaml").read_text())
    values["algorithm"], values["lora"]["client_ranks"] = {"name": "mine", "parameters": {"decay": 0.3}}, [2, 8, 4]
    run = tmp_path / "run"
    shutil.copytree(finished / "adapter", run / "adapter")
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert score_adapter(run) == score_adapter(finished)


def test_a_question_is_answered_as_the_same_test_sample_is(adapter: Adapter) -> None:
    """With the wording of training. An image is a picture or its path."""
    samples = load(adapter.experiment.data, adapter.experiment.seed).test[:4]
    asked = [{"question": s.question, "options": s.options, **s.content} for s in samples]
    encoder = Encoder(adapter.vlm, adapter.experiment.data.wording)
    expected = predict(adapter.vlm, samples, encoder, adapter.experiment.evaluation)
    found = adapter.predict(asked)
    assert [answer.answer for answer in found] == [answer.answer for answer in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-6)


def test_the_order_of_questions_does_not_change_their_answers(adapter: Adapter, tmp_path: Path) -> None:
    """With and without options, pictures by path and none at all."""
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    asked: list[dict[str, Any]] = [
        {"question": "Is it misleading?", "image": str(tmp_path / "white.png"), "text": "the total is 5", "options": ["no", "yes"]},
        {"question": "What is the total?", "text": "the total is 5"},
        {"question": "Is it misleading?", "image": None, "text": "the total is 5", "options": ["no", "yes"]},
    ]
    found = adapter.predict(asked)
    assert [bool(answer.probabilities) for answer in found] == [True, False, True]
    assert found[0].probabilities != found[2].probabilities
    again = adapter.predict(asked[::-1])[::-1]
    for one, other in zip(found, again, strict=True):
        assert one.answer == other.answer
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
    assert adapter.predict([]) == []


def test_a_chat_asks_every_question_about_the_same_content(finished: Path, adapter: Adapter, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    content: dict[Modality, Any] = {"image": tmp_path / "white.png", "text": "the total is 5"}
    ask = chat(finished, content=content, options=("no", "yes"))
    for question in ("Is it misleading?", "Is it true?"):
        (expected,) = adapter.predict([{"question": question, "options": ("no", "yes"), **content}])
        assert ask(question).probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    with pytest.raises(DataError, match=r"gone\.png"):
        chat(finished, content={"image": tmp_path / "gone.png"})


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ({"question": "?", "picture": "a.png"}, "question 1: 'picture' is not a known key; use question, image, text and options"),
        ({"text": "words"}, "question 1: question must be the text to ask, got None"),
        ({"question": 7}, "question 1: question must be the text to ask, got 7"),
        ({"question": "?", "image": "nowhere.png"}, r"nowhere\.png"),
    ],
)
def test_an_invalid_question_is_named(adapter: Adapter, question: dict[str, Any], part: str) -> None:
    with pytest.raises(DataError, match=part):
        adapter.predict([{"question": "Is it?", "text": "words"}, question])


def test_a_merged_model_answers_as_the_adapter_does(finished: Path, adapter: Adapter, tmp_path: Path) -> None:
    assert merge(finished, tmp_path / "merged") < 1e-3
    assert (tmp_path / "merged" / "README.md").read_text().startswith("# nano, fine-tuned with fedmllm\n")
    merged = load_model(ModelConfig(name=str(tmp_path / "merged")), torch.device("cpu"))
    asked = [{"question": s.question, "options": s.options, **s.content} for s in load(adapter.experiment.data, 0).test[:4]]
    found = Adapter(adapter.experiment, merged).predict(asked)
    for ours, theirs in zip(found, adapter.predict(asked), strict=True):
        assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)


def test_a_model_in_4_bits_is_merged_in_bfloat16(finished: Path, tmp_path: Path) -> None:
    """Quantized weights cannot hold the change. Rounding to bfloat16 loses a part of it."""
    assert 0 < merge(finished, tmp_path / "merged", None, ["model.quantization=4bit", "model.dtype=bfloat16"]) < 1
    assert {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


def test_an_existing_folder_is_not_merged_into(finished: Path, tmp_path: Path) -> None:
    """It is refused before anything is loaded, so a missing adapter is not what the error is about."""
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="there: already exists"):
        merge(tmp_path / "no adapter", tmp_path / "there")
    with pytest.raises(RunError, match="no adapter: no such folder"):
        merge(tmp_path / "no adapter", tmp_path / "new")
    assert not (tmp_path / "new").exists()
