from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedmllm.data.federated import FederatedData
from fedmllm.models.encoding import Encoded, answer_logits, answer_nll, collate, option_tokens
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder
from fedmllm.training.calibration import answer_counts, calibrated
from fedmllm.types import Sample


@pytest.fixture
def held(federation: FederatedData) -> list[Sample]:
    """Five samples of a yes-or-no question, four of them yes."""
    samples = [sample for client in federation.clients.values() for sample in client]
    no = next(s for s in samples if s.answer == "no")
    return [*[s for s in samples if s.answer == "yes"][:4], no]


def encoded(samples: list[Sample], encoder: Encoder) -> list[Encoded]:
    return [encoder(sample) for sample in samples]


def test_the_bias_is_the_log_of_smoothed_frequencies_whatever_the_order(
    vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]
) -> None:
    """Four yes and one no of two options: (4 + 1) / 7 and (1 + 1) / 7."""
    turned = replace(held[0], options=held[0].options[::-1])
    rows = calibrated(vlm, [turned, *held[1:]], encoded([turned, *held[1:]], encoder), 2.0)
    for sample, row in zip([turned, *held[1:]], rows, strict=True):
        assert row.option_bias is not None
        expected = [2 * math.log({"yes": 5, "no": 2}[option] / 7) for option in sample.options]
        assert row.option_bias[1].tolist() == pytest.approx(expected)
        assert row.option_bias[0].tolist() == option_tokens(vlm, sample)


def test_the_prior_may_be_that_of_all_clients(vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]) -> None:
    """Three clients with 5 samples in all, four of them yes: each adds (4 + 1) / 7 and (1 + 1) / 7, whatever it holds itself."""
    labels = answer_counts(held)
    assert labels == {'["no", "yes"]': {"no": 1, "yes": 4}}
    for own in (held[:2], held[2:4], held[4:]):
        for sample, row in zip(own, calibrated(vlm, own, encoded(own, encoder), 1.0, labels), strict=True):
            assert row.option_bias is not None
            assert row.option_bias[1].tolist() == pytest.approx([math.log({"yes": 5, "no": 2}[option] / 7) for option in sample.options])


def test_free_answers_have_no_prior(held: list[Sample]) -> None:
    assert answer_counts([replace(held[0], options=(), answer="seven", answer_type="open")]) == {}


def test_the_bias_enters_the_loss_at_the_letter_only(vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]) -> None:
    rows = encoded(held, encoder)
    batch = collate(vlm, calibrated(vlm, held, rows, 1.0))
    with torch.no_grad():
        plain, logits = answer_nll(vlm, collate(vlm, rows)), answer_logits(vlm, batch)
        ours = answer_nll(vlm, batch)
    assert torch.equal(ours[:, 1:], plain[:, 1:])
    for i, sample in enumerate(held):
        row = logits[i, 0].double().clone()
        for token, option in zip(option_tokens(vlm, sample), sample.options, strict=True):
            row[token] += math.log({"yes": 5, "no": 2}[option] / 7)
        letter = int(rows[i].answer_ids[0])
        assert float(ours[i, 0]) == pytest.approx(float(row.logsumexp(0) - row[letter]), abs=1e-4)


def test_questions_without_options_and_mixed_batches_are_left_alone(vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]) -> None:
    free = replace(held[0], id="free", options=(), answer="seven", answer_type="open")
    samples = [free, held[1]]
    rows = calibrated(vlm, samples, encoded(samples, encoder), 1.0)
    assert rows[0].option_bias is None
    with torch.no_grad():
        together = answer_nll(vlm, collate(vlm, rows))
        alone = answer_nll(vlm, collate(vlm, encoded(samples, encoder)))
    torch.testing.assert_close(together[0], alone[0], atol=1e-5, rtol=0)
    assert not torch.allclose(together[1], alone[1])


def test_a_client_with_even_answers_is_not_changed(vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]) -> None:
    """The same constant on every option shifts them against the rest of the vocabulary only."""
    even = [held[0], held[-1]]
    rows = calibrated(vlm, even, encoded(even, encoder), 1.0)
    assert all(row.option_bias is not None and row.option_bias[1].tolist() == pytest.approx([math.log(0.5)] * 2) for row in rows)
