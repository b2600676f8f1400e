from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmllm.data.federated import FederatedData
from fedmllm.data.prompts import LETTERS, to_messages
from fedmllm.evaluation.answers import _end_tokens, _read
from fedmllm.evaluation.evaluate import EvaluationConfig, predict
from fedmllm.models.encoding import answer_nll, collate, encode
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder
from fedmllm.types import Sample

CONFIG = EvaluationConfig()


@pytest.fixture
def vlm(nano: VisionLanguageModel) -> VisionLanguageModel:
    """The embedded model, which is trained to answer."""
    return nano


def test_probabilities_equal_brute_force(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    """Each option's letter is used as the answer; the likelihoods of its first token are normalized."""
    samples = federation.dataset.test[:6]
    for sample, prediction in zip(samples, predict(vlm, samples, encoder, CONFIG), strict=True):
        scores = []
        for letter in "AB":
            encoded = encode(vlm, to_messages(sample, "agnostic"), letter)
            with torch.no_grad():
                scores.append(-answer_nll(vlm, collate(vlm, [encoded]))[0, 0])
        expected = torch.softmax(torch.stack(scores), 0)
        torch.testing.assert_close(torch.tensor(prediction.probabilities), expected, atol=1e-4, rtol=0)
        assert prediction.answer == sample.options[int(expected.argmax())]
        assert sum(prediction.probabilities) == pytest.approx(1)


def test_batches_do_not_change_answers(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    samples = federation.dataset.test[:10]
    one, many = (predict(vlm, samples, encoder, EvaluationConfig(batch_size=size)) for size in (1, 10))
    assert [p.sample.id for p in many] == [s.id for s in samples]
    for a, b in zip(one, many, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-4)


def test_sixty_two_options_have_distinct_letters(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    """Each probability equals that of the whole prompt with the option's letter as the answer."""
    options = tuple(map(str, range(62)))
    sample = replace(federation.dataset.test[0], id="many", options=options, answer="30")
    (prediction,) = predict(vlm, [sample], encoder, CONFIG)
    with torch.no_grad():
        nll = [answer_nll(vlm, collate(vlm, [encode(vlm, to_messages(sample, "agnostic"), letter)]))[0, 0] for letter in LETTERS]
    torch.testing.assert_close(torch.tensor(prediction.probabilities), torch.softmax(-torch.stack(nll), 0), atol=1e-4, rtol=0)
    assert vlm.tokenizer.decode(encoder(sample).answer_ids, skip_special_tokens=True) == "e"


def reading(federation: FederatedData, count: int) -> list[Sample]:
    pictures = [sample.content["image"] for sample in federation.dataset.test[:count]]
    return [Sample(str(i), "Which number is written?", "?", {"image": p}, answer_type="open") for i, p in enumerate(pictures)]


def test_greedy_answers_equal_generate_one_by_one(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    samples = reading(federation, 4)
    for sample, prediction in zip(samples, predict(vlm, samples, encoder, CONFIG), strict=True):
        ids = encoder(sample).prompt_ids[None]
        with torch.no_grad():
            for _ in range(CONFIG.max_new_tokens):
                logits = vlm.model(input_ids=ids, pixel_values=encoder(sample).extras["pixel_values"]).logits[0, -1]
                ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
                if ids[0, -1] == vlm.tokenizer.eos_token_id:
                    break
        text = vlm.tokenizer.decode(ids[0, len(encoder(sample).prompt_ids) :], skip_special_tokens=True)
        assert prediction.answer == text


def test_an_answer_without_an_end_token_is_a_failure(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    (prediction,) = predict(vlm, reading(federation, 1), encoder, EvaluationConfig(max_new_tokens=1))
    assert prediction.answer is None


def test_a_truncated_closed_answer_keeps_its_complete_words(vlm: VisionLanguageModel) -> None:
    """A polite answer must not be lost. But "No" may begin "Normal", so a single word without an end is no answer."""
    ends = _end_tokens(vlm)

    def read(text: str, cut: bool) -> str | None:
        return _read(vlm, torch.tensor(vlm.tokenizer(text, add_special_tokens=False)["input_ids"]), ends, cut)

    assert read("Yes, it is to be seen in the", True) == "Yes, it is to be seen in"
    assert read("Yes, it is to be seen in the", False) is None
    assert read("No", True) is None
    assert read("No<|end|> more", True) == read("No<|end|> more", False) == "No"


def test_a_truncated_answer_is_read_for_closed_questions_and_fails_for_open_ones(
    vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData
) -> None:
    """A polite model is cut off one token before its end. The closed question's "yes it is" becomes "yes it"."""
    (opened,) = reading(federation, 1)
    opened = replace(opened, answer="yes it is")
    kinds = [opened, replace(opened, id="closed", answer_type="closed")]
    batch = collate(vlm, [encoder(sample) for sample in kinds])
    optimizer = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        answer_nll(vlm, batch).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert [p.answer for p in predict(vlm, kinds, encoder, CONFIG)] == ["yes it is"] * 2
    count = int(encoder(opened).answer_length) - 1
    cut = predict(vlm, kinds, encoder, EvaluationConfig(max_new_tokens=count))
    assert [p.answer for p in cut] == [None, "yes it"]


def test_probabilities_that_are_not_finite_are_a_failure(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    with torch.no_grad():
        vlm.model.get_base_model().lm_head.weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    predictions = predict(vlm, federation.dataset.test[:2], encoder, CONFIG)
    assert [p.answer for p in predictions] == [None, None]


def test_different_kinds_of_questions_can_be_mixed(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    samples = [*federation.dataset.test[:2], *reading(federation, 2), *federation.dataset.test[2:4]]
    assert [p.sample.id for p in predict(vlm, samples, encoder, CONFIG)] == [s.id for s in samples]
