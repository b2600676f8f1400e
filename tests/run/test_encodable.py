"""Samples that cannot be trained on or scored are found before the first round. A later error does not cost the adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.data.datasets.base import Dataset, hold_out
from fedmllm.data.federated import FederatedData
from fedmllm.errors import DataError
from fedmllm.models.load import load_model
from fedmllm.models.settings import ModelConfig
from fedmllm.run import splits
from fedmllm.run.encodable import encodable, usable
from fedmllm.run.reader import read_run
from fedmllm.run.scoring import score_adapter
from fedmllm.training.batches import Encoder
from fedmllm.types import Sample
from tiny_models import make


def experiment(root: Path, **sections: Any) -> Experiment:
    columns = {"text": "t", "answer": "a", "question": "q"}
    options = {"train": "train.jsonl", "test": "test.jsonl", "columns": columns, "choices": ["no", "yes"]}
    values: dict[str, Any] = {
        "data": {"dataset": "jsonl", "root": str(root), "options": options},
        "federation": {"num_clients": 1, "clients_per_round": 1, "num_rounds": 1, "partition": "iid"},
        "evaluation": {"every": 0, "baselines": []},
        "engine": {"device": "cpu"},
    }
    for name, section in sections.items():
        values[name] |= section
    return Experiment.parse(values)


def write(root: Path, long: str = "", test_answers: str = "ny") -> Path:
    """Ten training rows and two test rows. One split may get an additional, very long row."""
    for split, count in (("train", 10), ("test", 2)):
        answers = test_answers if split == "test" else "ny" * 5
        rows = [{"t": f"{split} {i}", "q": "Is it?", "a": {"n": "no", "y": "yes"}[answers[i]]} for i in range(count)]
        if split == long:
            rows.append({"t": "word " * 9000, "q": "Is it?", "a": "yes"})
        (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_text_too_long_for_the_model_is_a_bad_row(split: str, tmp_path: Path) -> None:
    """It is refused with the model's limit before the folder is created, or it is skipped, counted and noted, also when an adapter is scored."""
    write(tmp_path, long=split)
    with pytest.raises(
        DataError, match=r"the model cannot encode 1 sample\(s\); .*\n.*-(11|3): prompt and answer take .* the limit is 512, the"
    ) as caught:
        train(experiment(tmp_path), tmp_path / "run")
    assert "the model's own limit; shorten the text" in str(caught.value)
    assert not (tmp_path / "run").exists()
    train(experiment(tmp_path, data={"on_bad_sample": "skip"}), tmp_path / "run")
    found = read_run(tmp_path / "run").manifest
    assert (found.clients[0].num_samples, found.test.num_samples) == (10, 2)
    assert "1 sample(s) skipped that the model cannot encode" in found.notes
    assert score_adapter(tmp_path / "run")[1]["num_samples"] == 2


def test_the_configured_limit_and_the_models_limit_have_different_messages(tmp_path: Path) -> None:
    write(tmp_path, long="train")
    short = experiment(tmp_path).model_copy(update={"model": ModelConfig(max_length=100)})
    with pytest.raises(
        DataError,
        match=r"the limit is 100 \(model\.max_length\); shorten the text, or raise model\.max_length up to the model's own limit of 512",
    ):
        train(short, tmp_path / "run")


def test_every_picture_that_the_processor_rejects_is_listed(tmp_path: Path) -> None:
    """Qwen's processor rejects sides in a ratio above 200 to 1."""
    make("qwen2_5_vl", tmp_path)
    vlm = load_model(ModelConfig(name=str(tmp_path)), torch.device("cpu"))
    pictures = {"good": (40, 40), "thin": (10, 4000), "flat": (4000, 10)}
    samples = [Sample(name, "Is it?", "yes", {"image": Image.new("RGB", size)}, ("no", "yes")) for name, size in pictures.items()]
    data = FederatedData(
        Dataset("d", "auc", tuple(samples), (replace(samples[0], id="test"),), ("image",)),
        {"a": tuple(samples[:2]), "b": tuple(samples[2:])},
        0,
    )
    encoder = Encoder(vlm, "agnostic")
    with pytest.raises(DataError, match=r"(?s)the model cannot encode 2 sample\(s\).*sample thin: .*sample flat: "):
        encodable(data, encoder, "refuse")
    with pytest.raises(DataError, match="b: the model cannot encode any of the samples"):
        encodable(data, encoder, "skip")
    assert usable(samples, encoder, "skip") == (samples[0],)


@pytest.mark.parametrize(
    ("answers", "tested", "message"),
    [("nn", [], "the test split: the AUC needs samples of both classes"), ("ny", ["image"], "evaluation.tested: image")],
)
def test_a_scored_split_with_one_class_is_refused_before_training(answers: str, tested: list[str], message: str, tmp_path: Path) -> None:
    write(tmp_path, test_answers=answers)
    if tested:
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
        (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row | ({"p": "a.png"} if i else {})) for i, row in enumerate(rows)))
    given = experiment(tmp_path, evaluation={"tested": tested})
    if tested:
        given.data.options["columns"]["image"] = "p"
    with pytest.raises(DataError, match=message):
        train(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_held_out_share_contains_every_class() -> None:
    samples = [Sample(f"{i:03d}", "?", "x", {}, category="rare" if i < 5 else "common") for i in range(50)]
    for seed in range(20):
        rest, held = hold_out(samples, 0.2, seed)
        assert sorted(s.id for s in (*rest, *held)) == [s.id for s in samples]
        assert (len(held), sum(s.category == "rare" for s in held)) == (10, 1)
    assert [s.id for s in hold_out(samples, 0.2, 0)[1]] != [s.id for s in hold_out(samples, 0.2, 1)[1]]
    assert len(hold_out([*samples, *(Sample(f"x{i}", "?", "x", {}, category=f"{i}") for i in range(7))], 0.2, 0)[1]) == round(0.2 * 57)


@pytest.mark.parametrize("call", [1, 2])
def test_an_error_in_scoring_does_not_lose_the_adapter(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring fails within the last round or after it. The adapter is there, and the run can be resumed."""
    write(tmp_path)
    calls, evaluate = [0], splits.evaluate

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise ZeroDivisionError
        return evaluate(*arguments)

    given = experiment(tmp_path, evaluation={"tested": ["text"]})
    with monkeypatch.context() as patched:
        patched.setattr(splits, "evaluate", failing)
        with pytest.raises(ZeroDivisionError):
            train(given, tmp_path / "run")
    early = score_adapter(tmp_path / "run")[1]
    result = train(given, tmp_path / "run", resume=True)
    assert result.scores["federated"] == early["score"]
