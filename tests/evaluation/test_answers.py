from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmllm.data.federated import FederatedData
from fedmllm.data.prompts import LETTERS, to_messages
from fedmllm.evaluation.evaluate import EvaluationConfig, predict
from fedmllm.models.encoding import answer_nll, collate, encode
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder
from fedmllm.types import Sample

CONFIG = EvaluationConfig()


def test_probabilities_equal_brute_force(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    """Each option's letter put in as the answer, its first token's likelihood read off, and normalized."""
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


def test_sixty_two_options_are_told_apart(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    """The probability of each against the whole prompt with its letter put in as the answer."""
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


def test_an_answer_without_end_is_a_failure(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    (prediction,) = predict(vlm, reading(federation, 1), encoder, EvaluationConfig(max_new_tokens=1))
    assert prediction.answer is None


def test_probabilities_that_are_no_numbers_are_a_failure(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    with torch.no_grad():
        vlm.model.get_base_model().lm_head.weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    predictions = predict(vlm, federation.dataset.test[:2], encoder, CONFIG)
    assert [p.answer for p in predictions] == [None, None]


def test_kinds_of_questions_may_be_mixed(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    samples = [*federation.dataset.test[:2], *reading(federation, 2), *federation.dataset.test[2:4]]
    assert [p.sample.id for p in predict(vlm, samples, encoder, CONFIG)] == [s.id for s in samples]
