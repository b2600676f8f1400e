"""Modality-agnostic alignment: answers do not depend on which modality is missing. Our own form of an idea from arXiv 2411.14717."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmllm.algorithms.checks import require_not_negative
from fedmllm.algorithms.state import Client
from fedmllm.algorithms.strategies.base import Holdings, Remark, Strategy
from fedmllm.data.modalities import keep_only
from fedmllm.models.encoding import Encoded, answer_logits, collate
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder, batched
from fedmllm.training.rules import LocalRule
from fedmllm.training.terms import LossTerm, TermStep
from fedmllm.types import Broadcast, Sample


@dataclass(frozen=True)
class FeatureAlignment(Strategy):
    """Adds ``weight`` times the mean over answer tokens of ``KL(p(. | complete) || p(. | one modality less))`` to the clients' loss.

    p is the model's distribution over the answer's tokens; for a question with options, over the options' letters. The complete
    sample is the teacher and its copy without one modality is the student. Only samples with at least two modalities have a copy.
    ``weight = 0`` changes nothing.

    Attributes:
        weight: weight of the term in the loss.
    """

    weight: float = 0.5

    def __post_init__(self) -> None:
        require_not_negative(weight=self.weight)

    def rule(self, rule: LocalRule, broadcast: Broadcast, client: Client) -> LocalRule:
        """Add the alignment term, replacing one that the rule already has."""
        plain = rule.without(Alignment)
        return plain.with_term(Alignment(self.weight)) if self.weight else plain

    def remark(self, holdings: Holdings) -> Remark | None:
        """Report that the strategy is idle if its weight is 0 or no sample could lose a modality."""
        if not self.weight:
            return Remark("its weight is 0", idle=True)
        profiles = holdings.profiles.values()
        if all(profiles) and not any("+" in kind for profile in profiles for kind in profile):
            return Remark("no client holds a sample with two modalities, so there is nothing to align", idle=True)
        return None


@dataclass(frozen=True)
class Alignment(LossTerm):
    """Penalizes different answers to a complete sample and to its copy without one modality.

        weight / M * sum_i sum_t KL( p(. | complete sample i, a_<t) || p(. | sample i without one modality, a_<t) )

    The sum runs over the answer tokens t of the step's samples i that have at least two modalities. M is the number of answer tokens of
    all samples in the step. The modality that a sample loses is drawn in every step. No gradient flows through the complete sample.

    Attributes:
        weight: weight of the term in the loss.
    """

    weight: float
    name = "alignment"

    def prepare(self, vlm: VisionLanguageModel, encoder: Encoder, samples: Sequence[Sample], encoded: list[Encoded]) -> list[Encoded]:
        """Attach to each sample with several modalities one copy for each modality that it can lose."""
        return [
            replace(whole, companions={**whole.companions, self.name: _copies(encoder, sample)}) if len(sample.content) > 1 else whole
            for sample, whole in zip(samples, encoded, strict=True)
        ]

    def backward(self, step: TermStep) -> None:
        """Add the term's gradients to those of the client's parameters."""
        complete = [sample for sample in step.samples if self.name in sample.companions]
        copies = [sample.companions[self.name] for sample in complete]
        reduced = [some[step.rng.integers(len(some))] for some in copies]
        tokens = sum(sample.answer_length for sample in step.samples)
        for group in batched(step.vlm, complete, step.max_tokens):
            batches = [collate(step.vlm, [side[i] for i in group]) for side in (complete, reduced)]
            with step.vlm.autocast():
                with torch.no_grad():
                    teacher = answer_logits(step.vlm, batches[0])
                loss = self.weight / tokens * divergence(teacher, answer_logits(step.vlm, batches[1]), batches[0].answer_mask)
            loss.backward()  # type: ignore[no-untyped-call]


def _copies(encoder: Encoder, sample: Sample) -> tuple[Encoded, ...]:
    """Return copies of a sample, each without one of its modalities."""
    return tuple(encoder(keep_only(sample, [m for m in sample.modalities if m != lost])) for lost in sample.modalities)


def divergence(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
    """Return ``sum KL(softmax(teacher) || softmax(student))`` over the columns that the mask selects, in nats.

    Args:
        teacher: logits, shape (samples, columns, vocabulary).
        student: logits, same shape.
        mask: 1 for columns that count, shape (samples, columns).

    Returns:
        a scalar.
    """
    columns = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return (columns * mask).sum()
