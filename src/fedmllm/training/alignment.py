"""Modality-agnostic alignment: a complete sample and its copy with one modality less should answer alike."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmllm.models.encoding import answer_logits, collate
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Step, batched


def backward_alignment(vlm: VisionLanguageModel, step: Step, weight: float, rng: np.random.Generator, max_tokens: int) -> None:
    """Add to the gradients those of

        weight / M * sum_i sum_t KL( p(. | complete sample i, a_<t) || p(. | sample i without one modality, a_<t) )

    over the answer tokens of the step's complete samples; M counts the answer tokens of all its samples. Which modality a
    sample loses is drawn anew each time. The complete sample is the teacher: no gradient flows through its side.

    Args:
        vlm: the model.
        step: its complete samples carry their copies in ``reduced``.
        weight: of this term beside the loss.
        rng: draws the lost modality.
        max_tokens: padded tokens of one forward pass.
    """
    complete = [sample for sample in step.samples if sample.reduced]
    reduced = [sample.reduced[rng.integers(len(sample.reduced))] for sample in complete]
    tokens = sum(sample.answer_length for sample in step.samples)
    for group in batched(vlm, complete, max_tokens):
        batches = [collate(vlm, [side[i] for i in group]) for side in (complete, reduced)]
        with vlm.autocast():
            with torch.no_grad():
                teacher = answer_logits(vlm, batches[0])
            loss = weight / tokens * divergence(teacher, answer_logits(vlm, batches[1]), batches[0].answer_mask)
        loss.backward()  # type: ignore[no-untyped-call]


def divergence(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """``sum KL(softmax(teacher) || softmax(student))`` over the masked columns, in nats.

    Args:
        teacher: logits, shape (samples, columns, vocabulary).
        student: the same.
        mask: which columns count, shape (samples, columns).
    """
    columns = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return (columns * mask).sum()
