"""Frozen weights in 4 bits. They are meant for GPUs; where bitsandbytes is installed, its slow CPU path shows that they compute."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tiny_models
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.errors import ConfigError, ModelError
from fedmllm.models.encoding import answer_nll, collate
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import adapted_layers, attach_lora, frozen_weights, trainable, write_base
from fedmllm.models.lora import read_weights as read
from fedmllm.models.parts import LoraConfig
from fedmllm.models.plan import make_plan
from fedmllm.models.quantized import BITS, four_bits, require_gpu
from fedmllm.models.saved import save_adapter
from fedmllm.models.settings import ModelConfig
from fedmllm.training.batches import Encoder

installed = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: make test-quantized")
FOUR_BITS = {"dtype": "bfloat16", "quantization": "4bit"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Qwen3-VL whose widths are multiples of the 64 weights that share a scale."""
    recipe = tiny_models.RECIPES["qwen3_vl"]
    rope = tiny_models.MROPE | {"mrope_interleaved": True, "mrope_section": [4, 2, 2]}
    wide = {"hidden_size": 64, "intermediate_size": 128}

    def config(token: tiny_models.Callable[[str], int]) -> dict[str, object]:
        settings = recipe.config(token)
        text = settings["text_config"] | wide | {"head_dim": 16, "rope_parameters": rope}
        return settings | {"text_config": text, "vision_config": settings["vision_config"] | wide | {"out_hidden_size": 64}}

    monkeypatch.setitem(tiny_models.RECIPES, "qwen3_vl", replace(recipe, config=config))
    tiny_models.make("qwen3_vl", tmp_path / "wide")
    return tmp_path / "wide"


def quantized(folder: Path) -> VisionLanguageModel:
    from transformers import AutoModelForImageTextToText

    cpu = torch.device("cpu")
    whole = load_model(ModelConfig(name=str(folder), dtype="bfloat16"), cpu)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, **four_bits(torch.bfloat16, cpu))
    return replace(whole, model=model.requires_grad_(False).eval())


@installed
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated", "ignore:.*:UserWarning:bitsandbytes")
@pytest.mark.parametrize("config", [LoraConfig(), LoraConfig(connector="full", embeddings="full"), LoraConfig(dora=True)])
def test_adapters_train_on_a_quantized_model(folder: Path, config: LoraConfig, federation: FederatedData, tmp_path: Path) -> None:
    """The loss is close to the bfloat16 model's, gradients reach every trained tensor, and the adapter's folder has the usual format."""
    losses = []
    for vlm in (quantized(folder), load_model(ModelConfig(name=str(folder), dtype="bfloat16"), torch.device("cpu"))):
        vlm = attach_lora(vlm, config, 0)
        encoder = Encoder(vlm, "agnostic")
        vlm.model.train()
        with vlm.autocast():
            loss = answer_nll(vlm, collate(vlm, [encoder(sample) for sample in federation.clients["client-00"][:4]])).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for _, p in trainable(vlm.model))
        save_adapter(vlm, read(vlm.model), tmp_path / "adapter")
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


@installed
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_which_layers_are_quantized(folder: Path) -> None:
    """Linear layers of decoder and tower are quantized; connector, head, embeddings and norms are not. Quantized weights cannot change."""
    vlm = attach_lora(quantized(folder), LoraConfig(), 0)
    kinds = {name: type(module).__name__ for name, module in vlm.model.get_base_model().named_modules()}
    assert kinds["model.language_model.layers.0.mlp.up_proj"] == kinds["model.visual.blocks.0.attn.qkv"] == "Linear4bit"
    assert (
        kinds["model.visual.merger.linear_fc1"] == kinds["model.visual.deepstack_merger_list.1.linear_fc2"] == kinds["lm_head"] == "Linear"
    )
    assert frozen_weights(vlm) == {}
    name, layer = next(adapted_layers(vlm.model))
    with pytest.raises(ModelError, match=r"changes frozen weights, but .* is quantized to torch\.uint8"):
        write_base(vlm, {name: torch.zeros(layer.out_features, layer.in_features)})


def test_the_plan_counts_quantized_weights(folder: Path) -> None:
    whole, small = (make_plan(ModelConfig(name=str(folder), **settings), LoraConfig()) for settings in ({"dtype": "bfloat16"}, FOUR_BITS))  # type: ignore[arg-type]
    decoder = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    tower = 2 * (64 * 3 * 64 + 64 * 64 + 2 * 64 * 128)
    assert small.parameters == whole.parameters
    assert small.weight_bytes == pytest.approx(whole.weight_bytes - (16 - BITS) / 8 * (decoder + tower), abs=1)


def test_quantization_without_a_gpu_is_refused(folder: Path) -> None:
    """By setting, and for a checkpoint with quantized weights."""
    with pytest.raises(ModelError, match=r"model\.quantization: 4bit needs a GPU, but engine\.device is cpu"):
        load_model(ModelConfig(name=str(folder), **FOUR_BITS), torch.device("cpu"))  # type: ignore[arg-type]
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"whose weights are quantized, needs a GPU"):
        load_model(ModelConfig(name=str(folder)), torch.device("cpu"))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_quantization_without_bitsandbytes_is_refused_with_a_remedy() -> None:
    with pytest.raises(ModelError, match=r"pip install 'fedmllm\[quantized\]'"):
        require_gpu("model.quantization: 4bit", torch.device("cuda"))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"model": {"quantization": "4bit"}}, "4bit computes in bfloat16, but dtype is float32; set dtype to bfloat16"),
        ({"model": FOUR_BITS, "algorithm": {"name": "flora"}}, "flora adds to the frozen weights, which 4bit cannot hold exactly"),
        ({"model": FOUR_BITS, "algorithm": {"name": "yoco"}}, "yoco adds to the frozen weights"),
    ],
)
def test_contradictory_settings_are_refused(values: dict[str, object], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Experiment.parse(values)
    assert part in str(caught.value)
