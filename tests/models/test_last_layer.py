"""The last decoder layer, restricted to the columns that are read."""

from __future__ import annotations

import torch

from fedmllm.data.federated import FederatedData
from fedmllm.models.encoding import answer_nll, collate
from fedmllm.models.last_layer import lengthen, narrow, reading, shorten
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder


def test_an_unknown_decoder_is_not_shortened() -> None:
    """No list of layers, an empty list, and a layer whose attention mixes columns before its scores."""

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


def widths_of(vlm: VisionLanguageModel, federation: FederatedData) -> tuple[list[int], int, int]:
    """The columns that the last feed-forward block computes in a pass, all columns of the batch, and those that the loss reads."""
    encoder, widths = Encoder(vlm, "agnostic"), list[int]()
    batch = collate(vlm, [encoder(sample) for sample in federation.clients["client-00"][:2]])
    block = vlm.model.get_decoder().layers[-1].mlp
    hook = block.down_proj.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    with torch.no_grad():
        answer_nll(vlm, batch)
    hook.remove()
    return widths, batch.inputs["input_ids"].shape[1], batch.answer_mask.shape[1] + 1


def test_a_lengthened_layer_computes_every_column_again(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    assert shorten(vlm.model)
    widths, _, read = widths_of(vlm, federation)
    assert widths == [read]
    lengthen(vlm.model)
    widths, whole, _ = widths_of(vlm, federation)
    assert widths == [whole] > [read]
    assert shorten(vlm.model)
    assert widths_of(vlm, federation)[0] == [read]


def test_a_model_that_was_never_shortened_can_be_lengthened(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    lengthen(vlm.model)
    widths, whole, _ = widths_of(vlm, federation)
    assert widths == [whole]


def test_a_shortened_layer_computes_every_column_unless_a_pass_declares_how_many_are_read(
    vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData
) -> None:
    batch = collate(vlm, [encoder(federation.clients["client-00"][0])])
    with torch.no_grad():
        plain = vlm.model(**batch.inputs).logits
        shorten(vlm.model)
        assert torch.equal(vlm.model(**batch.inputs).logits, plain)
        with reading(2):
            torch.testing.assert_close(vlm.model(**batch.inputs).logits[:, -2:], plain[:, -2:], atol=1e-5, rtol=1e-4)
        assert torch.equal(vlm.model(**batch.inputs).logits, plain)


def test_a_narrow_head_computes_the_columns_that_are_read(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    batch = collate(vlm, [encoder(federation.clients["client-00"][0])])
    with torch.no_grad():
        plain = vlm.model(**batch.inputs).logits
        narrow(vlm.model)
        assert torch.equal(vlm.model(**batch.inputs).logits, plain)
        with reading(3):
            torch.testing.assert_close(vlm.model(**batch.inputs).logits, plain[:, -3:], atol=1e-5, rtol=1e-4)
