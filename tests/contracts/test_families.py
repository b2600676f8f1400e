"""Every model family goes through this suite; a new one adds one row to ``MODELS``: a loader of a tiny model of its class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fedmllm.data.federated import FederatedData
from fedmllm.data.images import open_image
from fedmllm.errors import ModelError
from fedmllm.models.encoding import Encoded, answer_nll, collate, encode
from fedmllm.models.families import FAMILIES
from fedmllm.models.features import VisionFeatures, serves
from fedmllm.models.load import ModelConfig, VisionLanguageModel, load_model
from fedmllm.models.lora import LoraConfig, attach_lora, read_weights
from fedmllm.models.tail import shorten
from fedmllm.training.batches import Encoder
from fedmllm.types import Message, Part

MODELS: dict[str, Callable[[], VisionLanguageModel]] = {
    "generic": lambda: load_model(ModelConfig(), torch.device("cpu")),
}


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return attach_lora(MODELS[request.param](), LoraConfig(), 0)


@pytest.fixture
def samples(model: VisionLanguageModel, federation: FederatedData) -> list[Encoded]:
    """Text only, image only, both, and two images."""
    first, second = (Part("image", open_image(sample.content["image"])) for sample in federation.dataset.test[:2])  # type: ignore[arg-type]
    text = Part("text", "Which number is written?")
    turns = [(text,), (first,), (first, text), (first, second, text)]
    return [encode(model, (Message("user", parts),), answer) for parts, answer in zip(turns, ["12", "7", "yes", "no, 4"], strict=True)]


def test_every_family_has_a_row() -> None:
    assert set(MODELS) == {"generic", *FAMILIES}


def test_a_mixed_batch_equals_its_samples_one_by_one(model: VisionLanguageModel, samples: list[Encoded]) -> None:
    with torch.no_grad():
        together = answer_nll(model, collate(model, samples)).sum(dim=1)
        alone = torch.cat([answer_nll(model, collate(model, [sample])).sum(dim=1) for sample in samples])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_a_modality_it_does_not_read_is_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(ModelError, match=r"samples hold scent, the model is fed .* only"):
        encode(model, (Message("user", (Part("scent", "x"), Part("text", "What is it?"))),), "rose")


def test_prompt_tokens_carry_no_loss(model: VisionLanguageModel, samples: list[Encoded]) -> None:
    batch = collate(model, samples)
    assert batch.answer_mask.sum(dim=1).tolist() == [sample.answer_length for sample in samples]
    with torch.no_grad():
        assert not answer_nll(model, batch)[~batch.answer_mask].any()


def test_kept_features_stand_for_pictures(model: VisionLanguageModel, samples: list[Encoded]) -> None:
    """The first time they are computed, then read; in any mixture, and where the store is too small for two."""
    assert serves(model)
    with torch.no_grad():
        plain = answer_nll(model, collate(model, samples))
        for room in (1 << 24, 1 << 16, 0):
            keeping = replace(model, features=VisionFeatures(model, room))
            for _ in range(2):
                torch.testing.assert_close(answer_nll(keeping, collate(keeping, samples)), plain, atol=1e-4, rtol=0)
                alone = answer_nll(keeping, collate(keeping, samples[2:3]))
                torch.testing.assert_close(alone.sum(1), plain[2:3].sum(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_the_last_layer_leaves_out_what_nobody_reads(name: str, targets: str, federation: FederatedData) -> None:
    """Losses and gradients are the same, and its feed-forward part sees the answers' columns only; adapters come before it or after."""
    widths: list[int] = []
    found = []
    for short in ("", "before", "after"):
        base = MODELS[name]()
        assert short != "before" or shorten(base.model)
        vlm = attach_lora(base, LoraConfig(targets=targets), 0)  # type: ignore[arg-type]
        assert short != "after" or (shorten(vlm.model) and shorten(vlm.model))
        vlm.model.get_decoder().layers[-1].mlp.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
        encoder = Encoder(vlm, "agnostic")
        batch = collate(vlm, [encoder(sample) for sample in federation.clients["client-00"][:4]])
        nll = answer_nll(vlm, batch)
        nll.sum().backward()  # type: ignore[no-untyped-call]
        found.append({"nll": nll.detach(), **{n: p.grad for n, p in vlm.model.named_parameters() if p.grad is not None}})
    assert widths == [batch.inputs["input_ids"].shape[1], *[batch.answer_mask.shape[1] + 1] * 2]
    for short_of in found[1:]:
        assert short_of.keys() == found[0].keys()
        for key, tensor in found[0].items():
            torch.testing.assert_close(short_of[key], tensor, atol=1e-5, rtol=1e-4)


def test_a_decoder_that_is_not_known_stays_as_it_is() -> None:
    """Without a list of layers, with an empty one, and with a layer whose attention mixes columns before its scores."""

    class Decoder(torch.nn.Module):
        def get_decoder(self) -> torch.nn.Module:
            return self

    empty, known, convolution = Decoder(), Decoder(), Decoder()
    empty.layers = torch.nn.ModuleList()
    for decoder in (known, convolution):
        decoder.layers = torch.nn.ModuleList([torch.nn.Module()])
        decoder.layers[0].self_attn = torch.nn.ModuleDict({f"{name}_proj": torch.nn.Linear(2, 2) for name in "qkvo"})
    convolution.layers[0].self_attn["conv"] = torch.nn.Conv1d(2, 2, 1)
    assert shorten(known)
    assert not shorten(convolution)
    assert not shorten(empty)
    assert not shorten(Decoder())


def test_gradients_reach_the_decoder_s_adapters_only(model: VisionLanguageModel, samples: list[Encoded]) -> None:
    answer_nll(model, collate(model, samples)).sum().backward()  # type: ignore[no-untyped-call]
    with_gradient = {name for name, p in model.model.named_parameters() if p.grad is not None}
    assert {name.replace(".default.", ".") for name in with_gradient} == set(read_weights(model.model))
    assert not any("vision" in name for name in with_gradient)
