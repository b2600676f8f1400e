"""Federated Learning with Label Distribution Skew via Logits Calibration. Zhang et al., ICML 2022; our form is logit adjustment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmllm.algorithms.base import Client, require_not_negative
from fedmllm.algorithms.strategies.base import Holdings, Remark, Strategy
from fedmllm.data.labels import answer_counts, options_key
from fedmllm.models.encoding import Encoded, option_tokens
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder
from fedmllm.training.rules import LocalRule
from fedmllm.training.terms import LossTerm, of_kind
from fedmllm.types import Broadcast, LabelCounts, Sample


@dataclass(frozen=True)
class LabelCalibration(Strategy):
    """Clients train on logits to which ``strength log p_k(option)`` is added, p_k the client's own frequencies of answers.

    They are counted over the client's other samples with the same options: the sample itself would tell its right answer.

    What a client's skew explains need not be learnt, so that its update carries less of it; in testing nothing is added
    (logit adjustment, Menon et al., ICLR 2021, client by client; the paper subtracts ``strength n_k(option)^(-1/4)`` instead).
    Frequencies stay with the client. Questions without options are trained plainly; ``strength = 0`` changes nothing.

    ``global_prior`` is a control: p_k is the frequencies of answers over all clients then, which no real server knows. What remains of a gain
    comes of removing a prior at all, as scores do reward that let rare classes weigh like frequent ones, and not of the clients' skew.

    Attributes:
        strength: of the calibration.
        global_prior: whether all clients' answers are counted instead of the client's own; for simulated clients only.
    """

    strength: float = 1.0
    global_prior: bool = False

    def __post_init__(self) -> None:
        require_not_negative(strength=self.strength)

    @property
    def needs_labels(self) -> bool:
        """Those of all clients are the global prior."""
        return self.global_prior

    def rule(self, rule: LocalRule, broadcast: Broadcast, client: Client) -> LocalRule:
        """The rule with the calibration, in place of one that it has."""
        plain, labels = rule.without(Calibration), broadcast.population.labels if self.global_prior else {}
        return plain.with_term(Calibration(self.strength, labels)) if self.strength else plain

    def remark(self, holdings: Holdings) -> Remark | None:
        """Idle where no question has options, and beside a method that calibrates alike."""
        own = of_kind(holdings.terms, Calibration)
        if own is not None and holdings.options is not False:
            if self.strength == own.strength and not self.global_prior:
                return Remark("the method itself calibrates by as much", idle=True)
            return Remark(f"it takes the place of the method's own calibration, whose strength is {own.strength:g}", idle=False)
        if not self.strength:
            return Remark("its strength is 0", idle=True)
        if holdings.options is False:
            return Remark("no client holds a question with options, so that there is nothing to calibrate", idle=True)
        return None


@dataclass(frozen=True)
class Calibration(LossTerm):
    """In training ``strength log p_k,-i(option)`` is added to the options' logits.

        p_k,-i(o) = (n_o - [o = y_i] + 1) / (n - 1 + number of options)

    counts answers among the *other* samples of the same options, whatever their order; y_i is the sample's own answer. With that in the
    counts, options that occur once would lean towards the right answer by log 2. Where ``n_o`` samples share it, leaving one out changes the
    log-odds by ``log(1 + 1 / n_o)``. Samples without options stay as they are.

    Attributes:
        strength: of the calibration.
        labels: whose answers are counted; the client's own if empty.
    """

    strength: float
    labels: LabelCounts = field(default_factory=dict)

    def prepare(self, vlm: VisionLanguageModel, encoder: Encoder, samples: Sequence[Sample], encoded: list[Encoded]) -> list[Encoded]:
        """The samples with what is added to their options' logits."""
        counts = self.labels or answer_counts(samples)
        return [
            replace(tensors, option_bias=self._bias(vlm, sample, counts[options_key(sample.options)])) if sample.options else tensors
            for sample, tensors in zip(samples, encoded, strict=True)
        ]

    def _bias(self, vlm: VisionLanguageModel, sample: Sample, counts: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        others = torch.tensor([max(0, counts.get(option, 0) - (option == sample.answer)) for option in sample.options])
        shares = (others + 1) / (others.sum() + len(others))
        return torch.tensor(option_tokens(vlm, sample)), self.strength * shares.log()
