"""The contract of every model family: the embedded model and one tiny model of each architecture, each with its own processor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image

from fedmllm import weights as W
from fedmllm.data.federated import FederatedData
from fedmllm.data.images import open_image
from fedmllm.data.prompts import to_messages
from fedmllm.errors import ModelError
from fedmllm.evaluation.answers import _end_tokens, _read, choose
from fedmllm.models.encoding import Encoded, answer_nll, collate, encode
from fedmllm.models.families import FAMILIES, TESTED
from fedmllm.models.families.generic import special_tokens
from fedmllm.models.features import VisionFeatures, serves
from fedmllm.models.last_layer import shorten
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import adapted_layers, attach_lora, copies, read_weights, trainable
from fedmllm.models.memory import Alive, peak_bytes
from fedmllm.models.parallel_adapters import parallel_adapters, stacked
from fedmllm.models.parts import LoraConfig
from fedmllm.models.plan import make_plan
from fedmllm.models.saved import save_adapter
from fedmllm.models.settings import ModelConfig
from fedmllm.training.batches import Encoder
from fedmllm.types import Message, Part, Sample
from tiny_families import KINDS, WITH_REMOTE, folder_of, load, stirred
from tiny_models import RECIPES


@pytest.fixture(params=WITH_REMOTE)
def model(request: pytest.FixtureRequest) -> VisionLanguageModel:
    return stirred(attach_lora(load(request.param), LoraConfig(), 0))


@pytest.fixture
def samples(model: VisionLanguageModel, federation: FederatedData) -> list[Encoded]:
    """Text only; image only; both; text with two images of different shapes; and a tall image."""
    first, second = (open_image(sample.content["image"]) for sample in federation.dataset.test[:2])  # type: ignore[arg-type]
    wide, tall = (Part("image", second.resize(size)) for size in ((256, 64), (40, 120)))
    image, text = Part("image", first), Part("text", "Which number is written?")
    turns = [(text,), (image,), (image, text), (image, wide, text), (tall,)]
    answers = ["12", "7", "yes", "no, 4", "yes"]
    return [encode(model, (Message("user", parts),), answer) for parts, answer in zip(turns, answers, strict=True)]


def test_every_family_has_a_row() -> None:
    assert set(FAMILIES) <= set(TESTED) == {*RECIPES, "minicpmv"}


def test_a_mixed_batch_equals_single_samples(model: VisionLanguageModel, samples: list[Encoded]) -> None:
    with torch.no_grad():
        batched = answer_nll(model, collate(model, samples)).sum(dim=1)
        alone = torch.cat([answer_nll(model, collate(model, [sample])).sum(dim=1) for sample in samples])
    torch.testing.assert_close(batched, alone, atol=1e-4, rtol=0)


def test_a_modality_it_does_not_read_is_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(ModelError, match=r"samples hold scent, but the model supports only"):
        encode(model, (Message("user", (Part("scent", "x"), Part("text", "What is it?"))),), "rose")


def test_prompt_tokens_carry_no_loss(model: VisionLanguageModel, samples: list[Encoded]) -> None:
    batch = collate(model, samples)
    assert batch.answer_mask.sum(dim=1).tolist() == [sample.answer_length for sample in samples]
    with torch.no_grad():
        assert not answer_nll(model, batch)[~batch.answer_mask].any()


def test_control_tokens_spelled_in_an_answer_are_plain_text(model: VisionLanguageModel) -> None:
    """Of all strings that the tokenizer reads as control tokens, only the real end token stays one."""
    specials = special_tokens(model.processor)
    controls = torch.tensor(model.tokenizer.convert_tokens_to_ids(list(specials)))
    ask = (Message("user", (Part("text", "What is it?"),)),)
    plain = encode(model, ask, "the tag").answer_ids
    for spelled in specials[:: max(1, len(specials) // 20)]:
        answer = f"the {spelled} tag"
        odd = encode(model, ask, answer).answer_ids
        assert odd[torch.isin(odd, controls)].tolist() == plain[torch.isin(plain, controls)].tolist()
        assert _read(model, odd, _end_tokens(model)) == answer


def test_kept_features_replace_pictures(model: VisionLanguageModel, samples: list[Encoded]) -> None:
    """Features are computed the first time and read afterwards, in any batch, also when the store holds fewer than two."""
    if not serves(model):
        pytest.skip("takes pictures only")
    with torch.no_grad():
        plain = answer_nll(model, collate(model, samples))
        for room in (1 << 24, 1 << 16, 0):
            keeping = replace(model, features=VisionFeatures(model, room))
            for _ in range(2):
                torch.testing.assert_close(answer_nll(keeping, collate(keeping, samples)), plain, atol=1e-4, rtol=0)
                alone = answer_nll(keeping, collate(keeping, samples[2:3]))
                torch.testing.assert_close(alone.sum(1), plain[2:3].sum(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", WITH_REMOTE)
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_the_last_layer_computes_only_the_columns_that_are_read(kind: str, targets: str, federation: FederatedData) -> None:
    """Losses and gradients do not change, and the feed-forward part computes the answers' columns only. Adapters come before or after."""
    widths: list[int] = []
    found = []
    for short in ("", "before", "after"):
        base = load(kind)
        assert short != "before" or shorten(base.model)
        vlm = attach_lora(base, LoraConfig(targets=targets), 0)  # type: ignore[arg-type]
        assert short != "after" or (shorten(vlm.model) and shorten(vlm.model))
        decoder = vlm.model.get_decoder()
        getattr(decoder, "model", decoder).layers[-1].mlp.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
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


def test_gradients_reach_the_decoder_s_adapters_only(model: VisionLanguageModel, samples: list[Encoded]) -> None:
    answer_nll(model, collate(model, samples)).sum().backward()  # type: ignore[no-untyped-call]
    with_gradient = {name for name, p in model.model.named_parameters() if p.grad is not None}
    assert {name.replace(".default.", ".") for name in with_gradient} == set(read_weights(model.model))
    assert not any("vision" in name for name in with_gradient)


def test_adapters_are_in_the_decoder_only(model: VisionLanguageModel) -> None:
    """Every decoder layer has adapters, whatever kind of attention it has."""
    decoder = model.model.get_decoder()
    decoder = getattr(decoder, "model", decoder)
    inside = {id(module) for module in decoder.modules()}
    adapted = dict(adapted_layers(model.model))
    assert all(id(layer) in inside for layer in adapted.values())
    for layer in decoder.layers:
        assert {id(module) for module in layer.modules()} & set(map(id, adapted.values()))


def test_the_loss_depends_on_the_picture(model: VisionLanguageModel, samples: list[Encoded], federation: FederatedData) -> None:
    """The same words with another picture give another loss. Otherwise a blind model would pass this suite."""
    (other,) = (Part("image", open_image(sample.content["image"])) for sample in federation.dataset.test[5:6])  # type: ignore[arg-type]
    changed = encode(model, (Message("user", (other, Part("text", "Which number is written?"))),), "yes")
    with torch.no_grad():
        ours, theirs = (float(answer_nll(model, collate(model, [sample])).sum()) for sample in (samples[2], changed))
    assert abs(ours - theirs) > 1e-3


def test_parallel_clients_use_their_own_adapters(model: VisionLanguageModel, samples: list[Encoded]) -> None:
    """Two parallel clients, the second with B negated, equal the model with one adapter after the other."""
    own = {name: tensor.clone() for name, tensor in read_weights(model.model).items()}
    clients = [own, {name: -tensor if "lora_B" in name else tensor for name, tensor in own.items()}]
    batch = collate(model, [samples[2], samples[3], samples[0], samples[2]])
    with torch.no_grad():
        with parallel_adapters(model.model) as layers, stacked(layers, clients, [2, 2]):
            batched = answer_nll(model, batch).sum(1)
        first = answer_nll(model, batch).sum(1)
        for name, weight in model.model.named_parameters():
            if "lora_B" in name:
                weight.neg_()
        second = answer_nll(model, batch).sum(1)
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(batched, torch.cat([first[:2], second[2:]]), atol=1e-4, rtol=0)


def test_option_probabilities_equal_brute_force(model: VisionLanguageModel, federation: FederatedData) -> None:
    """Each option's letter is used as the answer; the likelihoods of its first token are normalized."""
    asked = federation.dataset.test[:3]
    encoder = Encoder(model, "agnostic")
    for sample, prediction in zip(asked, choose(model, asked, [encoder(sample) for sample in asked]), strict=True):
        alone = [collate(model, [encode(model, to_messages(sample, "agnostic"), letter)]) for letter in "AB"]
        with torch.no_grad():
            expected = torch.softmax(torch.stack([-answer_nll(model, batch)[0, 0] for batch in alone]), 0)
        torch.testing.assert_close(torch.tensor(prediction.probabilities), expected, atol=1e-4, rtol=0)


def test_greedy_answers_take_the_most_likely_token(model: VisionLanguageModel, federation: FederatedData) -> None:
    """Two questions of different lengths in one batch. The first tokens equal the argmax of a full pass for each token."""
    pictures = [sample.content["image"] for sample in federation.dataset.test[:2]]
    asked = [Sample(str(i), "Which?" * (i + 1), "7", {"image": p}, answer_type="open") for i, p in enumerate(pictures)]
    encoded = [Encoder(model, "agnostic")(sample) for sample in asked]
    model.model.generation_config.eos_token_id = None
    for sample, found in zip(encoded, _tokens(model, encoded, 3), strict=True):
        written: list[int] = []
        for _ in range(3):
            ids = torch.cat([sample.prompt_ids, torch.tensor([*written, 0])])
            longer = {
                name: torch.cat([row[: len(sample.prompt_ids)], row.new_full((len(written) + 1,), model.family.answer_type)])
                for name, row in sample.by_token.items()
            }
            batch = collate(model, [replace(sample, input_ids=ids, answer_length=1, by_token=longer)])
            with torch.no_grad():
                logits = model.family.call(model.model, batch.inputs).logits[0, -2]
            written.append(int(logits.argmax()))
        assert found == written


def _tokens(model: VisionLanguageModel, encoded: list[Encoded], count: int) -> list[list[int]]:
    batch = collate(model, encoded, with_answers=False)
    with torch.no_grad():
        new = model.family.generate(model.model, batch.inputs, do_sample=False, max_new_tokens=count, pad_token_id=model.pad_token_id)
    rows: list[list[int]] = new.tolist()
    return rows


def test_a_sample_that_is_too_long_is_refused_not_cut(model: VisionLanguageModel, federation: FederatedData) -> None:
    """A cut could go through a picture's tokens."""
    picture = Part("image", open_image(federation.dataset.test[0].content["image"]))  # type: ignore[arg-type]
    turn = (Message("user", (picture, Part("text", "Which number is written?"))),)
    length = len(encode(model, turn, "7").input_ids)
    assert len(encode(replace(model, max_length=length), turn, "7").input_ids) == length
    with pytest.raises(ModelError, match=rf"take {length} tokens, but the limit is {length - 1}"):
        encode(replace(model, max_length=length - 1), turn, "7")


def test_a_picture_that_the_processor_rejects_names_its_sample() -> None:
    """Qwen's processor rejects sides in a ratio above 200 to 1."""
    vlm = load("qwen2_5_vl")
    sample = Sample("strip-7", "What?", "7", {"image": Image.new("RGB", (1, 300))}, answer_type="open")
    with pytest.raises(ModelError, match=r"sample strip-7: the processor of '.*' rejected it: absolute aspect ratio"):
        Encoder(vlm, "agnostic")(sample)


def test_max_image_side_shrinks_pictures_before_the_processor(model: VisionLanguageModel, federation: FederatedData) -> None:
    """The picture is shrunk with its aspect ratio kept, and the given picture does not change."""
    picture = open_image(federation.dataset.test[0].content["image"])  # type: ignore[arg-type]
    width, height = picture.size
    # No processor resizes pictures to this size.
    side = 20
    smaller = picture.copy()
    smaller.thumbnail((side, side))
    limited, expected, full = (
        encode(vlm, (Message("user", (Part("image", given), Part("text", "Which?"))),), "7")
        for vlm, given in ((replace(model, max_image_side=side), picture), (model, smaller), (model, picture))
    )
    assert picture.size == (width, height)
    assert limited.picture == expected.picture != full.picture
    assert torch.equal(limited.input_ids, expected.input_ids)


CUT = {"llava_onevision": 2, "idefics3": 2, "smolvlm": 2, "internvl": 8, "minicpmv4_6": 2}
"""The number of tiles into which processors cut a wide picture by default, beside the view of the whole."""


@pytest.mark.parametrize("kind", KINDS)
def test_max_slices_limits_the_tiles(kind: str, federation: FederatedData) -> None:
    """There are at most that many tiles beside the whole view, and the model still computes. A processor that does not slice refuses the setting."""
    wide = open_image(federation.dataset.test[0].content["image"]).resize((256, 128))  # type: ignore[arg-type]
    turn = (Message("user", (Part("image", wide), Part("text", "Which?"))),)
    if kind not in CUT:
        with pytest.raises(ModelError, match=r"model\.max_slices: the processor of .* does not slice images; use model\.max_image_side"):
            load_model(ModelConfig(name=folder_of(kind), max_slices=1), torch.device("cpu"))
        return
    sizes = {}
    for limit in (None, CUT[kind], 1):
        vlm = load_model(ModelConfig(name=folder_of(kind), max_slices=limit), torch.device("cpu"))
        sample = encode(vlm, turn, "7")
        sizes[limit] = sample.extras["pixel_values"].numel()
        with torch.no_grad():
            assert torch.isfinite(answer_nll(vlm, collate(vlm, [sample]))).all()
    tile = sizes[None] / (CUT[kind] + 1)
    assert tile <= sizes[1] <= 2 * tile < sizes[None]
    assert sizes[CUT[kind]] <= sizes[None]


@pytest.mark.parametrize("kind", WITH_REMOTE)
def test_a_saved_adapter_loads_in_plain_peft(kind: str, federation: FederatedData, tmp_path: Path) -> None:
    ours = stirred(attach_lora(load(kind), LoraConfig(), 0))
    save_adapter(ours, read_weights(ours.model), tmp_path / "adapter")
    plain = load(kind)
    theirs = replace(plain, model=PeftModel.from_pretrained(plain.model, str(tmp_path / "adapter")).eval())
    encoder = Encoder(ours, "agnostic")
    batch = collate(ours, [encoder(sample) for sample in federation.clients["client-00"][:3]])
    with torch.no_grad():
        torch.testing.assert_close(answer_nll(theirs, batch), answer_nll(ours, batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_the_models_parameters(kind: str) -> None:
    config, lora = ModelConfig(name=folder_of(kind)), LoraConfig()
    plan, vlm = make_plan(config, lora), attach_lora(load(kind), lora, 0)
    counts = {trained: sum(p.numel() for p in vlm.model.parameters() if p.requires_grad == trained) for trained in (False, True)}
    assert (plan.parameters, plan.trainable) == (counts[False], counts[True])
    assert plan.update_bytes == W.num_bytes(read_weights(vlm.model))


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_predicts_the_memory_of_a_pass(kind: str, checkpoints: bool) -> None:
    """Measured on a training pass of text. The prompt's masks and the loss come on top of the plan."""
    config, lora = ModelConfig(name=folder_of(kind), gradient_checkpointing=checkpoints), LoraConfig()
    vlm = attach_lora(load_model(config, torch.device("cpu")), lora, 0)
    sample = encode(vlm, (Message("user", (Part("text", "Which number is written? " * 12),)),), "12")
    vlm.model.train()
    measured = peak_bytes(lambda: answer_nll(vlm, collate(vlm, [sample])).sum().backward()) / len(sample.input_ids)  # type: ignore[no-untyped-call]
    # Recomputed linear attention works in chunks, whose number differs in the plan's pass.
    least = 0.55 if (kind, checkpoints) == ("minicpmv4_6", True) else 0.8
    assert least * measured < make_plan(config, lora).bytes_per_token < 1.1 * measured


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, federation: FederatedData) -> None:
    """Two parallel clients with a shortened last layer: the losses and gradients are the same, and less memory is kept."""
    found, kept = [], []
    for checkpoints in (False, True):
        config = ModelConfig(name=folder_of(kind), gradient_checkpointing=checkpoints)
        vlm = stirred(attach_lora(load_model(config, torch.device("cpu")), LoraConfig(), 0))
        shorten(vlm.model)
        encoder = Encoder(vlm, "agnostic")
        batch = collate(vlm, [encoder(sample) for sample in federation.clients["client-00"][:4]])
        own = copies(dict(trainable(vlm.model)), read_weights(vlm.model))
        clients = [{name: (sign * tensor).requires_grad_() for name, tensor in own.items()} for sign in (1, -1)]
        vlm.model.train()
        with parallel_adapters(vlm.model) as layers:
            with stacked(layers, clients, [2, 2]):
                with Alive() as alive:
                    nll = answer_nll(vlm, batch)
                kept.append(alive.now)
            # Outside the context, as on a GPU, where another thread runs the backward pass.
            nll.sum().backward()  # type: ignore[no-untyped-call]
        found.append([nll.detach(), *(tensor.grad for client in clients for tensor in client.values())])
    assert kept[1] < 0.8 * kept[0]
    for plain, again in zip(*found, strict=True):
        assert plain is not None
        torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-4)
