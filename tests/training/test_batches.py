from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.normalizers import Lowercase

from fedmllm.data.federated import FederatedData
from fedmllm.data.modalities import keep_only
from fedmllm.errors import DataError, ModelError
from fedmllm.models.encoding import Encoded, answer_logits, collate
from fedmllm.models.features import VisionFeatures
from fedmllm.models.load import VisionLanguageModel
from fedmllm.randomness import generator
from fedmllm.training.batches import Encoder, loss_weights, pack, poisson_steps, steps


def fake(length: int, answer: int) -> Encoded:
    return Encoded(torch.arange(length), answer, {})


@given(count=st.integers(1, 40), batch_size=st.integers(1, 6), accumulation=st.integers(1, 5))
def test_an_epoch_visits_every_sample_once(count: int, batch_size: int, accumulation: int) -> None:
    samples = [fake(i + 2, 1) for i in range(count)]
    epoch = list(steps(samples, batch_size, accumulation, generator(0, "t")))
    visited = [len(sample.input_ids) - 2 for step in epoch for micro in step.micro_batches for sample in micro]
    assert sorted(visited) == list(range(count))
    assert all(len(step.micro_batches) <= accumulation for step in epoch)
    assert sum(len(step.micro_batches) for step in epoch) == -(-count // batch_size)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200), st.integers(0, 100))
def test_groups_stay_within_the_limit(lengths: list[int], limit: int, pass_cost: int) -> None:
    groups = pack(lengths, limit, pass_cost)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(group == sorted(group) for group in groups)
    assert all(len(group) == 1 or max(lengths[i] for i in group) * len(group) <= limit for group in groups)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every partition of a list into groups."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i, group in enumerate(rest):
            yield [*rest[:i], [items[0], *group], *rest[i + 1 :]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 60), st.integers(0, 20), st.none() | st.integers(1, 4))
def test_no_partition_is_cheaper(lengths: list[int], limit: int, pass_cost: int, most: int | None) -> None:
    def cost(groups: list[list[int]]) -> int:
        return sum(pass_cost + len(group) * max(lengths[i] for i in group) for group in groups)

    def allowed(groups: list[list[int]]) -> bool:
        return all(
            len(group) == 1 or (len(group) * max(lengths[i] for i in group) <= limit and len(group) <= (most or len(group)))
            for group in groups
        )

    least = min(cost(groups) for groups in partitions(list(range(len(lengths)))) if allowed(groups))
    found = pack(lengths, limit, pass_cost, most)
    assert allowed(found)
    assert cost(found) == least


def test_packing_depends_on_the_cost_of_a_pass() -> None:
    """Pictures of 60 tokens and texts of 20 are separate if a pass is free, and together if a pass costs more than the padding."""
    lengths = [60, 20, 61, 20]
    assert pack(lengths, 1000, 0) == [[1, 3], [0], [2]]
    assert pack(lengths, 1000, 10) == [[1, 3], [0, 2]]
    assert pack(lengths, 1000, 500) == [[0, 1, 2, 3]]


def test_loss_weights_equal_gradient_accumulation() -> None:
    """In micro-batches with 3 and 5 answer tokens, each token weighs 1/2 * 1/3 and 1/2 * 1/5."""
    step = next(steps([fake(4, 1), fake(4, 2), fake(9, 5)], 2, 2, generator(1, "t")))
    sizes = [sum(sample.answer_length for sample in micro) for micro in step.micro_batches]
    flat = [sample for micro in step.micro_batches for sample in micro]
    expected = [1 / (2 * sizes[0 if i < len(step.micro_batches[0]) else 1]) for i in range(3)]
    assert loss_weights(step) == expected
    assert sum(w * s.answer_length for w, s in zip(loss_weights(step), flat, strict=True)) == 1


def test_poisson_steps_draw_every_sample_independently_and_at_the_rate() -> None:
    """Pairs of samples meet at the product of their rates; the number drawn varies as a binomial number does."""
    samples, rate, count = [fake(i + 2, 1) for i in range(20)], 0.25, 4000
    drawn = np.zeros((count, 20))
    for row, step in zip(drawn, poisson_steps(samples, rate, count, np.random.default_rng(0).random), strict=True):
        row[[len(sample.input_ids) - 2 for sample in step.samples]] = 1
    assert drawn.mean(0) == pytest.approx(rate, abs=0.03)
    assert np.cov(drawn.T) == pytest.approx(rate * (1 - rate) * np.eye(20), abs=0.02)
    assert drawn.sum(1).var() == pytest.approx(20 * rate * (1 - rate), rel=0.1)
    assert (drawn.sum(1) == 0).any()


def test_a_rate_of_one_draws_all_samples_and_no_samples_draw_none() -> None:
    rng = np.random.default_rng(0).random
    samples = [fake(i + 2, 1) for i in range(9)]
    assert [step.samples for step in poisson_steps(samples, 1.0, 2, rng)] == [samples, samples]
    assert [step.samples for step in poisson_steps([], 1.0, 2, rng)] == [[], []]


def test_the_loss_of_a_separate_sample_is_its_own_mean() -> None:
    (step,) = poisson_steps([fake(4, 1), fake(4, 2), fake(9, 5)], 1.0, 1, np.random.default_rng(0).random)
    assert loss_weights(step) == [1, 1 / 2, 1 / 5]


def test_encoder_caches_samples_up_to_its_limit(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    first, second = federation.dataset.test[:2]
    roomy = Encoder(vlm, "agnostic")
    assert roomy(first) is roomy(first)
    tight = Encoder(vlm, "agnostic", max_bytes=1)
    assert tight(first) is not tight(first)
    assert torch.equal(tight(second).input_ids, roomy(second).input_ids)


def test_encoder_distinguishes_a_sample_from_its_reduced_copy(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    encoder = Encoder(vlm, "agnostic")
    whole = federation.dataset.test[0]
    assert "pixel_values" in encoder(whole).extras
    assert "pixel_values" not in encoder(replace(whole, content={"text": whole.content["text"]})).extras


def test_encoder_distinguishes_samples_with_one_id_by_their_content(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    encoder, sample = Encoder(vlm, "agnostic"), federation.dataset.test[0]
    other = replace(sample, content={**sample.content, "text": "other words"})
    assert not torch.equal(encoder(other).input_ids, encoder(sample).input_ids)
    assert encoder(replace(sample, id="copy")) is encoder(sample)


def test_encoder_drops_keys_of_deleted_samples(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    """Scenarios create copies in every run, and alignment creates copies without a modality in every round."""
    encoder = Encoder(vlm, "agnostic")
    samples = [replace(sample) for sample in federation.dataset.test[:4]]
    list(map(encoder, [*samples, *(keep_only(sample, ["text"]) for sample in samples)]))
    gc.collect()
    assert len(encoder._keys) == 4
    del samples
    gc.collect()
    assert encoder._keys == {}


def test_an_error_names_its_sample(encoder: Encoder, federation: FederatedData) -> None:
    sample = replace(federation.dataset.test[0], id="many", options=tuple(map(str, range(63))), answer="1")
    with pytest.raises(DataError, match=r"^sample many: a sample has 63 options"):
        encoder(sample)


@pytest.fixture
def encoded_ids(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the encoded samples, in order."""
    encoded: list[str] = []
    real = Encoder._encoded
    monkeypatch.setattr(Encoder, "_encoded", lambda self, sample: encoded.append(sample.id) or real(self, sample))
    return encoded


def with_features(vlm: VisionLanguageModel, max_bytes: int) -> VisionLanguageModel:
    return replace(vlm, features=VisionFeatures(vlm, max_bytes))


def test_stored_features_leave_room_for_all_samples_of_a_round(
    vlm: VisionLanguageModel, federation: FederatedData, encoded_ids: list[str]
) -> None:
    """Room for the pixels of two samples, used in the order in which the least recently used is always next: each of 12 is read once."""
    samples = federation.dataset.test[:12]
    pixels = Encoder(vlm, "agnostic")(samples[0]).extras["pixel_values"].nbytes
    for keeping, expected in ((with_features(vlm, 1 << 24), 12), (vlm, 36)):
        encoder = Encoder(keeping, "agnostic", max_bytes=int(2.5 * pixels))
        encoded_ids.clear()
        for _ in range(3):
            for sample in samples:
                encoder(sample)
        assert len(encoded_ids) == expected


def test_dropped_pixels_are_read_again_for_evicted_features(
    vlm: VisionLanguageModel, federation: FederatedData, encoded_ids: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The store has room for the features of three pictures; a batch has six. The answers are the same, and a warning says that it is small."""
    samples = federation.dataset.test[:6]
    plain = [Encoder(vlm, "agnostic")(sample) for sample in samples]
    one = with_features(vlm, 1 << 24)
    (row,) = [one.features._features(plain[0])]
    keeping = with_features(vlm, 3 * sum(-(-tensor.nbytes // 64) * 64 for tensor in row.values()))
    encoder = Encoder(keeping, "agnostic")
    slim = [encoder(sample) for sample in samples]
    assert all("pixel_values" not in sample.extras for sample in slim)
    assert [sample.picture for sample in slim] == [sample.picture for sample in plain]
    assert "engine.feature_bytes" not in caplog.text
    encoded_ids.clear()
    with torch.no_grad():
        found, expected = answer_logits(keeping, collate(keeping, slim)), answer_logits(one, collate(one, plain))
    assert torch.equal(found, expected)
    assert len(encoded_ids) >= 3
    assert caplog.text.count("engine.feature_bytes holds the features of 3 images, fewer than are in use") == 1


def test_a_sample_keeps_its_pixels_if_its_features_do_not_fit(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    encoded = Encoder(with_features(vlm, 8), "agnostic")(federation.dataset.test[0])
    assert "pixel_values" in encoded.extras


def test_a_model_without_a_store_can_use_samples_without_pixels(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    slim = Encoder(with_features(vlm, 1 << 24), "agnostic")(federation.dataset.test[0])
    whole = Encoder(vlm, "agnostic")(federation.dataset.test[0])
    with torch.no_grad():
        assert torch.equal(answer_logits(vlm, collate(vlm, [slim])), answer_logits(vlm, collate(vlm, [whole])))


def test_letters_with_the_same_token_are_refused_at_encoding(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    """For a tokenizer that lowercases, A and a are the same token. Models of a kind share a processor, so that this one gets its own."""
    vlm = replace(vlm, processor=copy.deepcopy(vlm.processor))
    vlm.tokenizer.backend_tokenizer.normalizer = Lowercase()
    encoder = Encoder(vlm, "agnostic")
    sample = federation.dataset.test[0]
    many = replace(sample, id="many", options=(*sample.options, *map(str, range(25))))
    encoder(sample)
    with pytest.raises(ModelError, match=r"sample many: .* gives some letters of 27 options the same first token"):
        encoder(many)
