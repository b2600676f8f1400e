"""The fingerprint of a model's folder: equal for copies, different for any other model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmllm.errors import ModelError
from fedmllm.models.load import fingerprint_of, load_model
from fedmllm.models.settings import ModelConfig
from fedmllm.models.source import NANO_FOLDER

NANO = fingerprint_of(ModelConfig())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(NANO_FOLDER, tmp_path / "copy")


def change(folder: Path, alter: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(alter(load_file(file)), file, metadata={"format": "pt"})


def set_key(folder: Path, key: str, value: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def test_a_bfloat16_copy_saved_by_another_version_has_the_same_fingerprint(copy: Path) -> None:
    change(copy, lambda weights: {name: tensor.bfloat16() for name, tensor in weights.items()})
    set_key(copy, "transformers_version", "99")
    set_key(copy, "dtype", "bfloat16")
    assert fingerprint_of(ModelConfig(name=str(copy))) == NANO


def test_a_copy_in_several_files_has_the_same_fingerprint(copy: Path) -> None:
    load_model(ModelConfig(name=str(copy)), torch.device("cpu")).model.save_pretrained(copy.parent / "sharded", max_shard_size="1MB")
    assert len(list((copy.parent / "sharded").glob("*.safetensors"))) > 1
    shutil.copy(copy / "config.json", copy.parent / "sharded")
    assert fingerprint_of(ModelConfig(name=str(copy.parent / "sharded"))) == NANO


def test_a_difference_in_one_tensor_or_setting_changes_the_fingerprint(copy: Path) -> None:
    name = next(name for name in sorted(load_file(copy / "model.safetensors")) if name.endswith("layers.5.self_attn.q_proj.weight"))
    change(copy, lambda weights: weights | {name: weights[name] * 1.02})
    trained = fingerprint_of(ModelConfig(name=str(copy)))
    shutil.copy(NANO_FOLDER / "model.safetensors", copy)
    set_key(copy, "image_token_index", 7)
    assert len({NANO, trained, fingerprint_of(ModelConfig(name=str(copy)))}) == 3


def test_a_model_with_another_fingerprint_does_not_load() -> None:
    with pytest.raises(ModelError, match=f"'nano' does not match model.fingerprint .found {NANO}, expected 0+."):
        load_model(ModelConfig(fingerprint="0" * 16), torch.device("cpu"))
    load_model(ModelConfig(fingerprint=NANO), torch.device("cpu"))
