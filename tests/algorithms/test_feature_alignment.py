from __future__ import annotations

import numpy as np
import pytest
import torch

from fedmllm import weights as W
from fedmllm.algorithms.strategies.feature_alignment import Alignment, divergence
from fedmllm.data.federated import FederatedData
from fedmllm.models.encoding import Encoded, answer_logits, collate
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights, trainable
from fedmllm.training.batches import Encoder, Step
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_locally
from fedmllm.training.rules import LocalRule
from fedmllm.training.settings import TrainingConfig
from fedmllm.training.terms import TermStep


@pytest.fixture
def vlm(nano: VisionLanguageModel) -> VisionLanguageModel:
    """The embedded model, whose pretrained features can be aligned."""
    return nano


def test_divergence_is_the_sum_of_kl_over_masked_columns() -> None:
    teacher, student = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    p, q = (np.exp(t.double().numpy()) / np.exp(t.double().numpy()).sum(-1, keepdims=True) for t in (teacher, student))
    expected = (p * np.log(p / q)).sum(-1)[mask.numpy()].sum()
    assert float(divergence(teacher, student, mask)) == pytest.approx(expected, rel=1e-4)
    assert float(divergence(teacher, teacher, mask)) == pytest.approx(0, abs=1e-6)


@pytest.fixture
def step(vlm: VisionLanguageModel, federation: FederatedData, encoder: Encoder) -> Step:
    """Four complete samples and two that lack a modality."""
    samples = [sample for client in federation.clients.values() for sample in client]
    complete = [s for s in samples if len(s.content) == 2][:4]
    incomplete = [s for s in samples if len(s.content) == 1][:2]
    held = complete + incomplete
    return Step((tuple(Alignment(1.0).prepare(vlm, encoder, held, [encoder(sample) for sample in held])),))


def copies(sample: Encoded) -> tuple[Encoded, ...]:
    return sample.companions.get("alignment", ())


def test_complete_samples_carry_a_copy_for_each_modality_they_can_lose(step: Step, encoder: Encoder) -> None:
    assert [len(copies(sample)) for sample in step.samples] == [2, 2, 2, 2, 0, 0]
    without_image, without_text = copies(step.samples[0])
    assert "pixel_values" not in without_image.extras
    assert "pixel_values" in without_text.extras
    assert all(torch.equal(copy.answer_ids, step.samples[0].answer_ids) for copy in copies(step.samples[0]))


def gradients(vlm: VisionLanguageModel, step: Step, max_tokens: int) -> dict[str, torch.Tensor]:
    vlm.model.zero_grad()
    Alignment(1.0).backward(TermStep(vlm, step.samples, np.random.default_rng(0), max_tokens))
    return {name: p.grad.clone() for name, p in trainable(vlm.model) if p.grad is not None}


def test_the_gradient_does_not_depend_on_how_the_samples_are_packed(vlm: VisionLanguageModel, step: Step) -> None:
    packed, singly = gradients(vlm, step, 8192), gradients(vlm, step, 1)
    assert packed.keys() == singly.keys() != set()
    assert W.norm(W.subtract(packed, singly)) < 1e-4 * W.norm(packed)


def test_without_complete_samples_there_is_no_gradient(vlm: VisionLanguageModel, step: Step) -> None:
    assert gradients(vlm, Step((tuple(step.samples[4:]),)), 8192) == {}


def test_alignment_makes_answers_of_copies_similar(vlm: VisionLanguageModel, step: Step) -> None:
    """After training on the same samples, copies answer more like the complete samples than without the term."""
    task = LocalTask("c", 0, 0, step.samples, read_weights(vlm.model), 3e-3)
    config = TrainingConfig(local_epochs=6)

    def distance_after_training(weight: float) -> float:
        train_locally(vlm, task, LocalRule(terms=(Alignment(weight),)), config)
        vlm.model.zero_grad()
        pairs = [(s, copy) for s in step.samples for copy in copies(s)]
        with torch.no_grad():
            sides = [collate(vlm, [pair[side] for pair in pairs]) for side in (0, 1)]
            return float(divergence(answer_logits(vlm, sides[0]), answer_logits(vlm, sides[1]), sides[0].answer_mask))

    assert distance_after_training(2.0) < 0.7 * distance_after_training(0.0)
