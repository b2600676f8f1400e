"""Federated Learning with Label Distribution Skew via Logits Calibration. Zhang et al., ICML 2022; our form is logit adjustment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedmllm.algorithms.checks import require_not_negative
from fedmllm.algorithms.state import Client
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
    """Adds ``strength log p_k(option)`` to the options' logits during training, where p_k are the client's own answer frequencies.

    The frequencies are counted over the client's other samples with the same options. The sample itself is excluded, because its
    count would reveal the correct answer.

    The adapter need not learn what the client's label skew already explains, so its update carries less of that skew. Nothing is added
    during testing. This is logit adjustment (Menon et al., ICLR 2021) per client; the paper subtracts ``strength n_k(option)^(-1/4)``
    instead. The frequencies never leave the client. Questions without options are trained without calibration. ``strength = 0`` changes
    nothing.

    ``global_prior`` is a control experiment: p_k are then the answer frequencies over all clients, which no real server knows. Any
    gain that remains does not come from the clients' skew. It comes from removing a prior at all, which raises scores that weigh rare and
    frequent classes equally.

    Attributes:
        strength: strength of the calibration.
        global_prior: whether to use the answers of all clients instead of the client's own. Only for simulated clients.
    """

    strength: float = 1.0
    global_prior: bool = False

    def __post_init__(self) -> None:
        require_not_negative(strength=self.strength)

    @property
    def needs_labels(self) -> bool:
        """Whether the prior is global: it consists of all clients' answer counts."""
        return self.global_prior

    def rule(self, rule: LocalRule, broadcast: Broadcast, client: Client) -> LocalRule:
        """Add the calibration, replacing one that the rule already has."""
        plain, labels = rule.without(Calibration), broadcast.population.labels if self.global_prior else {}
        return plain.with_term(Calibration(self.strength, labels)) if self.strength else plain

    def remark(self, holdings: Holdings) -> Remark | None:
        """Report that the strategy is idle or replaces the calibration of the method itself."""
        own = of_kind(holdings.terms, Calibration)
        if own is not None and holdings.options is not False:
            if self.strength == own.strength and not self.global_prior:
                return Remark("the method already calibrates with the same strength", idle=True)
            return Remark(f"it replaces the method's own calibration, which has strength {own.strength:g}", idle=False)
        if not self.strength:
            return Remark("its strength is 0", idle=True)
        if holdings.options is False:
            return Remark("no client holds a question with options, so there is nothing to calibrate", idle=True)
        return None


@dataclass(frozen=True)
class Calibration(LossTerm):
    """Adds ``strength log p_k,-i(option)`` to the options' logits during training.

        p_k,-i(o) = (n_o - [o = y_i] + 1) / (n - 1 + number of options)

    n_o counts the answer o among the samples with the same set of options in any order, and n counts these samples. The sample's own
    answer y_i is left out. If it were included, an answer that occurs once would favor the correct option by log 2; an answer that
    occurs n_o times would favor it by ``log(1 + 1 / n_o)``. Samples without options are not changed.

    Attributes:
        strength: strength of the calibration.
        labels: the answer counts to use; empty for the client's own.
    """

    strength: float
    labels: LabelCounts = field(default_factory=dict)

    def prepare(self, vlm: VisionLanguageModel, encoder: Encoder, samples: Sequence[Sample], encoded: list[Encoded]) -> list[Encoded]:
        """Attach to each sample with options the values to add to its options' logits."""
        counts = self.labels or answer_counts(samples)
        return [
            replace(tensors, option_bias=self._bias(vlm, sample, counts[options_key(sample.options)])) if sample.options else tensors
            for sample, tensors in zip(samples, encoded, strict=True)
        ]

    def _bias(self, vlm: VisionLanguageModel, sample: Sample, counts: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        others = torch.tensor([max(0, counts.get(option, 0) - (option == sample.answer)) for option in sample.options])
        shares = (others + 1) / (others.sum() + len(others))
        return torch.tensor(option_tokens(vlm, sample)), self.strength * shares.log()
