from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedmllm.algorithms.strategies.label_calibration import Calibration
from fedmllm.data.federated import FederatedData
from fedmllm.data.labels import answer_counts
from fedmllm.models.encoding import Encoded, answer_logits, answer_nll, collate, option_tokens
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder
from fedmllm.types import Sample


@pytest.fixture
def held(federation: FederatedData) -> list[Sample]:
    """Five samples of a yes-or-no question, four of them with the answer yes."""
    samples = [sample for client in federation.clients.values() for sample in client]
    no = next(s for s in samples if s.answer == "no")
    return [*[s for s in samples if s.answer == "yes"][:4], no]


def encoded(samples: list[Sample], encoder: Encoder) -> list[Encoded]:
    return [encoder(sample) for sample in samples]


def calibrated(term: Calibration, vlm: VisionLanguageModel, encoder: Encoder, samples: list[Sample]) -> list[Encoded]:
    return term.prepare(vlm, encoder, samples, encoded(samples, encoder))


SHARES = {"yes": {"yes": 4 / 6, "no": 2 / 6}, "no": {"yes": 5 / 6, "no": 1 / 6}}
"""By the sample's own answer. The other four are three yes and one no, (3 + 1) / (4 + 2) and (1 + 1) / (4 + 2), or four yes."""


def test_the_bias_is_the_log_of_smoothed_frequencies_in_any_option_order(
    vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]
) -> None:
    reversed_options = replace(held[0], options=held[0].options[::-1])
    rows = calibrated(Calibration(2.0), vlm, encoder, [reversed_options, *held[1:]])
    for sample, row in zip([reversed_options, *held[1:]], rows, strict=True):
        assert row.option_bias is not None
        expected = [2 * math.log(SHARES[sample.answer][option]) for option in sample.options]
        assert row.option_bias[1].tolist() == pytest.approx(expected)
        assert row.option_bias[0].tolist() == option_tokens(vlm, sample)


def test_options_of_a_single_question_get_no_preference(vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]) -> None:
    """No other question has these options, so nothing is known of them, and none is preferred."""
    own = [replace(s, id=f"own-{i}", options=(f"a{i}", f"b{i}", f"c{i}"), answer=f"{'abc'[i % 3]}{i}") for i, s in enumerate(held)]
    for row in calibrated(Calibration(1.0), vlm, encoder, own):
        assert row.option_bias is not None
        assert row.option_bias[1].tolist() == pytest.approx([-math.log(3)] * 3)


def test_the_bias_of_shared_options_leaves_out_the_sample_itself(vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]) -> None:
    """Compared with (n_o + 1) / (n + 3) over all samples, the right option's odds fall by 1 + 1 / n_o; those of two wrong options stay."""
    counts = {"a": 5, "b": 2, "c": 1}
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    three = [replace(held[0], id=f"three-{i}", options=("a", "b", "c"), answer=answer) for i, answer in enumerate(answers)]
    whole = {option: math.log((count + 1) / (8 + 3)) for option, count in counts.items()}
    for sample, row in zip(three, calibrated(Calibration(1.0), vlm, encoder, three), strict=True):
        assert row.option_bias is not None
        change = {option: value - whole[option] for option, value in zip("abc", row.option_bias[1].tolist(), strict=True)}
        right = change.pop(sample.answer)
        first, second = change.values()
        assert first == pytest.approx(second, abs=1e-6)
        assert right - first == pytest.approx(-math.log(1 + 1 / counts[sample.answer]), abs=1e-6)


def test_the_prior_can_count_all_clients(vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]) -> None:
    """Three clients hold 5 samples, four of them yes. Leaving one out, a yes leaves 3 and 1, a no 4 and 0, at every client."""
    labels = answer_counts(held)
    shares = {"yes": {"yes": 4 / 6, "no": 2 / 6}, "no": {"yes": 5 / 6, "no": 1 / 6}}
    for own in (held[:2], held[2:4], held[4:]):
        for sample, row in zip(own, calibrated(Calibration(1.0, labels), vlm, encoder, own), strict=True):
            assert row.option_bias is not None
            assert row.option_bias[1].tolist() == pytest.approx([math.log(shares[sample.answer][option]) for option in sample.options])


def test_the_bias_changes_the_loss_of_the_letter_only(vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]) -> None:
    rows = encoded(held, encoder)
    batch = collate(vlm, calibrated(Calibration(1.0), vlm, encoder, held))
    with torch.no_grad():
        plain, logits = answer_nll(vlm, collate(vlm, rows)), answer_logits(vlm, batch)
        ours = answer_nll(vlm, batch)
    assert torch.equal(ours[:, 1:], plain[:, 1:])
    for i, sample in enumerate(held):
        row = logits[i, 0].double().clone()
        for token, option in zip(option_tokens(vlm, sample), sample.options, strict=True):
            row[token] += math.log(SHARES[sample.answer][option])
        letter = int(rows[i].answer_ids[0])
        assert float(ours[i, 0]) == pytest.approx(float(row.logsumexp(0) - row[letter]), abs=1e-4)


def test_questions_without_options_are_unchanged_in_mixed_batches(vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]) -> None:
    free = replace(held[0], id="free", options=(), answer="seven", answer_type="open")
    samples = [free, held[1]]
    rows = calibrated(Calibration(1.0), vlm, encoder, samples)
    assert rows[0].option_bias is None
    with torch.no_grad():
        batched = answer_nll(vlm, collate(vlm, rows))
        alone = answer_nll(vlm, collate(vlm, encoded(samples, encoder)))
    torch.testing.assert_close(batched[0], alone[0], atol=1e-5, rtol=0)
    assert not torch.allclose(batched[1], alone[1])


def test_with_one_sample_per_answer_the_bias_counts_the_other_sample(
    vlm: VisionLanguageModel, encoder: Encoder, held: list[Sample]
) -> None:
    """Only the other sample counts: (0 + 1) / (1 + 2) for the sample's own answer, (1 + 1) / (1 + 2) for the other answer."""
    even = [held[0], held[-1]]
    for sample, row in zip(even, calibrated(Calibration(1.0), vlm, encoder, even), strict=True):
        assert row.option_bias is not None
        expected = [math.log((1 if option == sample.answer else 2) / 3) for option in sample.options]
        assert row.option_bias[1].tolist() == pytest.approx(expected)
