"""The model card of a run's adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fedmllm.config import Experiment
from fedmllm.models.lora import adapted_layers
from fedmllm.models.source import model_source
from fedmllm.run.card import adapter_card
from trained_runs import outcome


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
