"""Trained parts beside the decoder's adapters, on every family: counted, trained, saved, and loaded by plain PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from fedmllm.data.federated import FederatedData
from fedmllm.errors import ModelError, RunError
from fedmllm.models.encoding import Batch, answer_nll, collate
from fedmllm.models.families import FAMILIES
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import attach_lora, read_weights, trainable
from fedmllm.models.parallel_adapters import stackable
from fedmllm.models.parts import LoraConfig, parts
from fedmllm.models.saved import save_adapter, save_merged
from fedmllm.models.settings import ModelConfig
from fedmllm.training.batches import Encoder
from minicpmv_stand_in import true_geometry
from tiny_families import KINDS, WITH_REMOTE, folder_of, load, stirred

CHOICES = {
    "adapters": LoraConfig(),
    "bridge": LoraConfig(connector="lora"),
    "whole": LoraConfig(connector="full", embeddings="full"),
    "directions": LoraConfig(dora=True, rslora=True, targets="all-linear", r=4),
}
WITHOUT_LINEAR = {"gemma3"}
"""Models whose connectors have matrices that are not linear layers."""


def batch_of(vlm: VisionLanguageModel, federation: FederatedData) -> Batch:
    """Samples with and without pictures."""
    encoder = Encoder(vlm, "agnostic")
    return collate(vlm, [encoder(sample) for sample in federation.clients["client-00"][:4]])


def attached(kind: str, choice: str) -> VisionLanguageModel:
    if choice == "bridge" and kind in WITHOUT_LINEAR:
        pytest.skip("has nothing to put an adapter on")
    return attach_lora(load(kind), CHOICES[choice], 0)


@pytest.mark.parametrize("kind", WITH_REMOTE)
@pytest.mark.parametrize("choice", CHOICES)
def test_parts_are_counted_trained_and_saved(kind: str, choice: str, federation: FederatedData, tmp_path: Path) -> None:
    """The plan's count equals the model's, every tensor gets a gradient, and PEFT's file holds them under the names that clients send."""
    vlm = attached(kind, choice)
    weights = read_weights(vlm.model)
    plain = load(kind)
    counted = parts(plain.model, plain.family, CHOICES[choice])
    assert sum(part.parameters for part in counted if part.trains) == sum(tensor.numel() for tensor in weights.values())
    assert stackable(vlm.model) == (choice == "adapters") == CHOICES[choice].trains_in_parallel
    batch = batch_of(stirred(vlm), federation)
    ours = answer_nll(vlm, batch)
    ours.sum().backward()  # type: ignore[no-untyped-call]
    assert [name for name, parameter in trainable(vlm.model) if parameter.grad is None] == []
    save_adapter(vlm, read_weights(vlm.model), tmp_path / "adapter")
    assert weights.keys() <= load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    theirs = replace(plain, model=PeftModel.from_pretrained(plain.model, str(tmp_path / "adapter")).eval())
    with torch.no_grad():
        torch.testing.assert_close(answer_nll(theirs, batch), ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_merged_model_loads_like_any_other(kind: str, choice: str, federation: FederatedData, tmp_path: Path) -> None:
    vlm = stirred(attached(kind, choice))
    batch = batch_of(vlm, federation)
    with torch.no_grad():
        adapted = answer_nll(vlm, batch)
        save_merged(vlm, tmp_path / "merged")
        merged = load_model(ModelConfig(name=str(tmp_path / "merged")), torch.device("cpu"))
        again = batch_of(merged, federation)
        assert torch.equal(again.inputs["input_ids"], batch.inputs["input_ids"])
        torch.testing.assert_close(answer_nll(merged, again), adapted, atol=1e-4, rtol=0)
    with pytest.raises(RunError, match="already exists"):
        save_merged(merged, tmp_path / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_trained_parameters_of_a_bfloat16_model_are_float32(kind: str, federation: FederatedData) -> None:
    config = ModelConfig(name=folder_of(kind), dtype="bfloat16")
    vlm = attach_lora(load_model(config, torch.device("cpu")), CHOICES["whole"], 0)
    assert {parameter.dtype for _, parameter in trainable(vlm.model)} == {torch.float32}
    with vlm.autocast():
        loss = answer_nll(vlm, batch_of(vlm, federation)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(torch.isfinite(parameter.grad).all() for _, parameter in trainable(vlm.model) if parameter.grad is not None)


@pytest.mark.parametrize("kind", sorted(WITHOUT_LINEAR))
def test_a_connector_without_linear_layers_takes_no_adapter(kind: str) -> None:
    with pytest.raises(ModelError, match=r"lora\.connector: the model's connector has no linear layer for an adapter; use full"):
        attach_lora(load(kind), LoraConfig(connector="lora"), 0)


def test_an_unknown_connector_is_refused() -> None:
    vlm = load("minicpmv")
    vlm.model.bridge = vlm.model.resampler
    del vlm.model.resampler
    with pytest.raises(ModelError, match=r"lora\.connector: this model's connector is not known; leave it frozen"):
        attach_lora(vlm, LoraConfig(connector="full"), 0)


def test_bytes_of_minicpm_v_2_6_equal_the_published_ones() -> None:
    """In bfloat16: 1.23 GB per direction with embeddings and resampler, 10.1 MB without.

    The decoder is Qwen2-7B: 28 layers of width 3,584, keys and values of width 512, and 151,666 tokens. q and o take
    8 (3,584 + 3,584) parameters, k and v 8 (3,584 + 512). The rest of the published number is the resampler.
    """
    with torch.device("meta"):
        model = true_geometry()
    adapters, _, resampler, embeddings = parts(model, FAMILIES["minicpmv"], LoraConfig(connector="full", embeddings="full"))
    assert adapters.parameters == 28 * 8 * (2 * 7168 + 2 * 4096) == 5_046_272
    assert embeddings.parameters == 151_666 * 3584
    assert (adapters.parameters + resampler.parameters + embeddings.parameters) == 617_236_480
    assert round(2 * adapters.parameters / 1e6, 1) == 10.1
    assert round(2 * 617_236_480 / 1e9, 2) == 1.23


def test_tied_embeddings_stay_tied(federation: FederatedData) -> None:
    """The head and the embeddings share one trained tensor, which is sent once."""
    vlm = attach_lora(load("internvl"), CHOICES["whole"], 0)
    names = [name for name, _ in trainable(vlm.model) if "embed_tokens" in name or "lm_head" in name]
    assert len(names) == 1
    inner: nn.Module = vlm.model.get_base_model()
    head, tokens = inner.get_output_embeddings(), inner.get_input_embeddings()  # type: ignore[operator]
    assert head.weight.data_ptr() == tokens.weight.data_ptr()
