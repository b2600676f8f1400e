from __future__ import annotations

import json

import pytest

from fedmllm.cli.listings import settings
from fedmllm.config import Experiment
from fedmllm.errors import ConfigError
from fedmllm.reports.settings import TOP, catalog

SECTIONS = catalog()


def test_every_setting_has_a_meaning() -> None:
    assert set(SECTIONS) - {TOP, "training.schedule"} == Experiment.model_fields.keys() - {"seed", "plugins"}
    assert set(SECTIONS[TOP]["settings"]) == {"seed", "plugins"}
    for row in SECTIONS.values():
        assert row["summary"]
        for setting in row["settings"].values():
            assert setting["meaning"].endswith(".")


def test_a_setting_is_described_by_type_default_and_rule() -> None:
    assert SECTIONS["training"]["settings"]["beta1"] == {
        "type": "float",
        "default": "0.9",
        "rule": "≥ 0 and < 1",
        "advanced": True,
        "meaning": "AdamW's decay rate for the mean of the gradient.",
    }
    assert SECTIONS["engine"]["settings"]["server"]["type"] == "path or null"


def test_advanced_settings_are_counted_unless_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    settings("training")
    common = capsys.readouterr().out
    assert "clip_norm: 1.0   float or null > 0" in common
    assert "beta1" not in common
    assert common.endswith("\n3 more with --advanced\n")
    settings("training", advanced=True)
    everything = capsys.readouterr().out
    assert "beta1: 0.9   float ≥ 0 and < 1" in everything
    assert "--advanced" not in everything


def test_json_and_an_unknown_section(capsys: pytest.CaptureFixture[str]) -> None:
    settings(advanced=True, as_json=True)
    assert json.loads(capsys.readouterr().out) == SECTIONS
    with pytest.raises(ConfigError, match="did you mean engine"):
        settings("engin")
