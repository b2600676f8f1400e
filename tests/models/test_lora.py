from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmllm.errors import ModelError
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import attach_lora, read_weights, trainable, write_weights
from fedmllm.models.parts import LoraConfig
from fedmllm.models.saved import load_adapter, save_adapter
from fedmllm.models.settings import ModelConfig
from fedmllm.models.source import model_source


@pytest.fixture
def vlm(nano: VisionLanguageModel) -> VisionLanguageModel:
    """The embedded model, whose layers and sizes are known here."""
    return nano


def fresh() -> VisionLanguageModel:
    return load_model(ModelConfig(), torch.device("cpu"))


def test_only_the_decoder_has_adapters(vlm: VisionLanguageModel) -> None:
    names = list(read_weights(vlm.model))
    assert len(names) == 6 * 4 * 2
    assert all("language_model.layers." in name and ".default" not in name for name in names)
    assert not any("vision_tower" in name for name in names)


def test_targets_choose_the_layers() -> None:
    names = list(read_weights(attach_lora(fresh(), LoraConfig(targets="all-linear", r=2), 0).model))
    assert len(names) == 6 * 7 * 2


def test_initial_weights_depend_on_the_seed() -> None:
    first, again, other = (read_weights(attach_lora(fresh(), LoraConfig(), seed).model) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(not tensor.any() for name, tensor in first.items() if "lora_B" in name)


def test_written_weights_are_read_back_as_copies(vlm: VisionLanguageModel) -> None:
    weights = {name: torch.randn_like(tensor) for name, tensor in read_weights(vlm.model).items()}
    write_weights(vlm.model, weights)
    read = read_weights(vlm.model)
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    next(iter(read.values())).zero_()
    assert any(parameter.any() for _, parameter in trainable(vlm.model))
    assert torch.equal(read_weights(vlm.model)[next(iter(weights))], next(iter(weights.values())))


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_change_nothing(vlm: VisionLanguageModel, damage: str) -> None:
    before = read_weights(vlm.model)
    bad = {name: tensor + 1 for name, tensor in before.items()}
    name = sorted(bad)[-1]
    if damage == "missing":
        del bad[name]
    elif damage == "unknown":
        bad["other.lora_A.weight"] = torch.zeros(1)
    else:
        bad[name] = bad[name][:1]
    with pytest.raises(ModelError, match="do not fit the model"):
        write_weights(vlm.model, bad)
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_weights(vlm.model).items())


def test_saved_adapter_is_a_standard_peft_folder(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    vlm = attach_lora(load_model(ModelConfig(onednn=False), torch.device("cpu")), LoraConfig(), seed=0)
    weights = {name: torch.randn_like(tensor) for name, tensor in read_weights(vlm.model).items()}
    for _ in range(2):
        save_adapter(vlm, weights, tmp_path / "adapter")
    base = AutoModelForImageTextToText.from_pretrained(model_source("nano"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, vlm.model.eval()(input_ids=ids).logits, rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert not list((tmp_path / "adapter").glob("*.bin"))


def test_missing_and_damaged_adapters_are_refused(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        load_adapter(fresh(), tmp_path)
    save_adapter(vlm, read_weights(vlm.model), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="does not fit model 'nano'"):
        load_adapter(fresh(), tmp_path / "adapter")


def test_a_full_disk_is_reported_with_the_adapters_path(vlm: VisionLanguageModel, tmp_path: Path) -> None:
    """Safetensors has error messages of its own. The adapter that was there stays."""
    resource = pytest.importorskip("resource")
    save_adapter(vlm, read_weights(vlm.model), tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            save_adapter(vlm, read_weights(vlm.model), tmp_path / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert full.value.filename == str(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("layers", "message"),
    [(4, r"16 of its tensors do not match; .*\n  - the model has no place for .*layers\.[45]\."), (0, "the adapter lacks .*layers.5")],
)
def test_an_adapter_is_not_truncated_to_fit(layers: int, message: str, vlm: VisionLanguageModel, tmp_path: Path) -> None:
    """A base model with four layers instead of six; an adapter without the factors of a layer."""
    save_adapter(vlm, read_weights(vlm.model), tmp_path / "adapter")
    other = fresh()
    if layers:
        other.model.model.language_model.layers = other.model.model.language_model.layers[:layers]
    else:
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({name: tensor for name, tensor in load_file(file).items() if ".layers.5." not in name}, file)
    with pytest.raises(ModelError, match=message):
        load_adapter(other, tmp_path / "adapter")
