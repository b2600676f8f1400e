from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fedmllm.errors import ModelError
from fedmllm.models.load import NANO_FOLDER, ModelConfig, choose_device, load_model


def load(name: str | Path) -> None:
    load_model(ModelConfig(name=str(name)), torch.device("cpu"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The embedded model's folder, to be damaged."""
    return shutil.copytree(NANO_FOLDER, tmp_path / "model")


def test_a_copy_of_the_folder_loads_like_any_other_model(copy: Path) -> None:
    vlm = load_model(ModelConfig(name=str(copy), dtype="bfloat16"), torch.device("cpu"))
    assert next(vlm.model.parameters()).dtype == torch.bfloat16
    assert not vlm.model.training
    assert not any(parameter.requires_grad for parameter in vlm.model.parameters())
    assert vlm.max_length == 512


def test_a_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights in \*\.safetensors"):
        load(copy)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, which can run code"):
        load(copy)


def test_damaged_weights(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        load(name)


def test_a_model_without_chat_template(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        load(copy)


def test_a_model_without_processor(copy: Path) -> None:
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "tpu"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(ModelError, match=r"engine\.device"):
        choose_device(device)
