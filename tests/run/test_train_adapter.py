"""The adapter of a run gives the run's own predictions with only Transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmllm.api import train
from fedmllm.config import Experiment
from fedmllm.data.federated import federate
from fedmllm.data.prompts import to_messages
from fedmllm.engine.checkpoint import RunStore
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import write_base, write_weights
from fedmllm.models.source import model_source
from fedmllm.run.scoring import score_adapter
from fedmllm.types import Sample
from trained_runs import change, outcome


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


@pytest.mark.parametrize("method", ["flora", pytest.param("fedex_lora", marks=pytest.mark.slow)])
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
