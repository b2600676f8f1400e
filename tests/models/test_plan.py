"""Plans of models whose weights are not downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Qwen2_5_VLConfig

from fedmllm.errors import ModelError
from fedmllm.models.parts import LoraConfig
from fedmllm.models.plan import make_plan
from fedmllm.models.settings import ModelConfig

TEXT = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A config and nothing else."""
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config={"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 64})
    config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_plan_counts_the_parameters_of_a_choice(folder: Path) -> None:
    """Rank 8 in 4 layers: q and o have 64 inputs and outputs, k and v 64 inputs and 2 * 16 outputs."""
    small = make_plan(ModelConfig(name=str(folder)), LoraConfig())
    assert small.trainable == 4 * 8 * (2 * (64 + 64) + 2 * (64 + 32))
    assert small.update_bytes == 4 * small.trainable
    assert make_plan(ModelConfig(name=str(folder)), LoraConfig(r=16)).trainable == 2 * small.trainable
    wide = make_plan(ModelConfig(name=str(folder)), LoraConfig(targets="all-linear"))
    assert wide.trainable == small.trainable + 4 * 8 * 3 * (64 + 128)
    half = make_plan(ModelConfig(name=str(folder), dtype="bfloat16"), LoraConfig())
    assert small.weight_bytes == 4 * small.parameters == 2 * half.weight_bytes
    assert 0.4 < half.bytes_per_token / small.bytes_per_token < 0.8
    assert small.memory(100, clients=3) == small.weight_bytes + 3 * 16 * small.trainable + 100 * small.bytes_per_token


def test_memory_is_proportional_to_layers(folder: Path, tmp_path: Path) -> None:
    """Twice as many layers keep twice as much memory, except what is kept outside of them."""
    Qwen2_5_VLConfig(text_config=TEXT | {"num_hidden_layers": 8}, vision_config={"depth": 1}).save_pretrained(tmp_path / "deep")
    once, twice = (make_plan(ModelConfig(name=str(path)), LoraConfig()).bytes_per_token for path in (folder, tmp_path / "deep"))
    assert 1.8 < twice / once <= 2


@pytest.mark.parametrize(
    ("name", "part"),
    [("./nowhere", "is not a folder"), ("empty", r"has no config\.json"), ("text", "cannot be planned: .*qwen2")],
)
def test_models_that_cannot_be_planned_are_refused(name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ModelError, match=part):
        make_plan(ModelConfig(name=name), LoraConfig())
