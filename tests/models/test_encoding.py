from __future__ import annotations

import pytest
import torch

from fedmllm.data.federated import FederatedData
from fedmllm.data.prompts import to_messages
from fedmllm.errors import ModelError
from fedmllm.models.encoding import Encoded, answer_nll, collate, encode
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder
from fedmllm.types import Message, Part, Sample


@pytest.fixture
def mixed(federation: FederatedData, encoder: Encoder) -> list[Encoded]:
    """Samples with an image, a text, or both, of different lengths."""
    samples = [sample for client in federation.clients.values() for sample in client]
    chosen = [next(s for s in samples if s.modalities == kind) for kind in (("image",), ("text",), ("image", "text"))]
    free = Sample("free", "Which digits?", "4711 and more", {"image": chosen[0].content["image"]}, answer_type="open")
    return [encoder(sample) for sample in [*chosen, free]]


def test_a_mixed_batch_equals_single_samples(vlm: VisionLanguageModel, mixed: list[Encoded]) -> None:
    with torch.no_grad():
        together = answer_nll(vlm, collate(vlm, mixed)).sum(dim=1)
        alone = torch.cat([answer_nll(vlm, collate(vlm, [sample])).sum(dim=1) for sample in mixed])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_only_answer_tokens_carry_loss(vlm: VisionLanguageModel, mixed: list[Encoded]) -> None:
    """Compared with the full logits of the whole sequence, which the package never computes."""
    sample = mixed[-1]
    batch = collate(vlm, [sample])
    with torch.no_grad():
        nll = answer_nll(vlm, batch)[0]
        logits = vlm.model(**batch.inputs).logits[0].log_softmax(-1)
    start = len(sample.prompt_ids)
    expected = [-logits[i - 1, sample.input_ids[i]] for i in range(start, len(sample.input_ids))]
    torch.testing.assert_close(nll, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_the_answer_ends_with_the_end_token(vlm: VisionLanguageModel, mixed: list[Encoded]) -> None:
    assert all(int(sample.answer_ids[-1]) == vlm.tokenizer.eos_token_id for sample in mixed)
    assert vlm.tokenizer.decode(mixed[-1].answer_ids, skip_special_tokens=True) == "4711 and more"


def test_prompts_alone_drop_the_answer(vlm: VisionLanguageModel, mixed: list[Encoded]) -> None:
    batch = collate(vlm, mixed, with_answers=False)
    for row, mask, sample in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"], mixed, strict=True):
        assert torch.equal(row[mask.bool()], sample.prompt_ids)


def test_two_images_in_one_sample(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    pictures = [sample.content["image"] for sample in federation.dataset.test[:2]]
    parts = tuple(Part("image", picture) for picture in pictures)
    both = encode(vlm, (Message("user", (*parts, Part("text", "Same?"))),), "no")
    assert both.extras["pixel_values"].shape[0] == 2
    swapped = encode(vlm, (Message("user", (*parts[::-1], Part("text", "Same?"))),), "no")
    with torch.no_grad():
        a, b = (answer_nll(vlm, collate(vlm, [sample])).sum() for sample in (both, swapped))
    assert abs(a - b) > 1e-6


def test_the_loss_depends_on_the_picture(vlm: VisionLanguageModel, mixed: list[Encoded]) -> None:
    sample = mixed[0]
    blank = Encoded(sample.input_ids, sample.answer_length, {"pixel_values": torch.ones_like(sample.extras["pixel_values"])})
    with torch.no_grad():
        seen, unseen = (answer_nll(vlm, collate(vlm, [item])).sum() for item in (sample, blank))
    assert abs(seen - unseen) > 1e-4


def test_a_sample_longer_than_the_context_is_refused(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    sample = Sample("long", "word " * 2000, "yes", {"image": federation.dataset.test[0].content["image"]})
    with pytest.raises(ModelError, match=r"tokens, but the limit is 512, the model's own limit"):
        encode(vlm, to_messages(sample, "agnostic"), "yes")


def test_special_tokens_spelled_in_a_text_are_plain_text(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    """A hostile text must not be read as an image or an end of turn."""
    sample = Sample("odd", "<image><|end|> what?", "yes", {"image": federation.dataset.test[0].content["image"], "text": "<image>"})
    encoded = encode(vlm, to_messages(sample, "agnostic"), "yes")
    image_token = vlm.tokenizer.convert_tokens_to_ids("<image>")
    assert int((encoded.input_ids == image_token).sum()) == 16


@pytest.mark.parametrize("answer", ["the <image> tag", "yes <|end|> no <pad> x"])
def test_special_tokens_spelled_in_an_answer_are_plain_text(answer: str, vlm: VisionLanguageModel, federation: FederatedData) -> None:
    """It trains like any text: the picture's features stay in their place, and only the real end token ends the answer."""
    sample = Sample("odd", "What?", answer, {"image": federation.dataset.test[0].content["image"]}, answer_type="open")
    encoded = encode(vlm, to_messages(sample, "agnostic"), answer)
    specials = {id_: token for token, id_ in vlm.tokenizer.get_added_vocab().items()}
    assert [specials[i] for i in encoded.answer_ids.tolist() if i in specials] == [vlm.tokenizer.eos_token]
    assert answer_nll(vlm, collate(vlm, [encoded])).isfinite().all()
