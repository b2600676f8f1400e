from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.data.federated import FederatedData
from fedmllm.models.encoding import Encoded
from fedmllm.models.load import VisionLanguageModel
from fedmllm.randomness import generator
from fedmllm.training.batches import Encoder, loss_weights, pack, steps


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


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 200))
def test_groups_stay_within_the_limit(lengths: list[int], limit: int) -> None:
    groups = pack(lengths, limit)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    assert all(len(group) == 1 or max(lengths[i] for i in group) * len(group) <= limit for group in groups)


def test_weights_are_those_of_accumulation() -> None:
    """Micro-batches with 3 and 5 answer tokens: each token weighs 1/2 * 1/3 and 1/2 * 1/5."""
    step = next(steps([fake(4, 1), fake(4, 2), fake(9, 5)], 2, 2, generator(1, "t")))
    sizes = [sum(sample.answer_length for sample in micro) for micro in step.micro_batches]
    flat = [sample for micro in step.micro_batches for sample in micro]
    expected = [1 / (2 * sizes[0 if i < len(step.micro_batches[0]) else 1]) for i in range(3)]
    assert loss_weights(step) == expected
    assert sum(w * s.answer_length for w, s in zip(loss_weights(step), flat, strict=True)) == 1


def test_encoder_keeps_samples_up_to_its_limit(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    first, second = federation.dataset.test[:2]
    roomy = Encoder(vlm, "agnostic")
    assert roomy(first) is roomy(first)
    tight = Encoder(vlm, "agnostic", max_bytes=1)
    assert tight(first) is not tight(first)
    assert torch.equal(tight(second).input_ids, roomy(second).input_ids)


def test_encoder_tells_a_sample_from_its_reduced_copy(vlm: VisionLanguageModel, federation: FederatedData) -> None:
    from dataclasses import replace

    encoder = Encoder(vlm, "agnostic")
    whole = federation.dataset.test[0]
    assert "pixel_values" in encoder(whole).extras
    assert "pixel_values" not in encoder(replace(whole, content={"text": whole.content["text"]})).extras
