"""Federated Learning with Label Distribution Skew via Logits Calibration. Zhang et al., ICML 2022; our form is logit adjustment."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedmllm.algorithms.base import Client, require_not_negative
from fedmllm.algorithms.strategies.base import Holdings, Remark, Strategy
from fedmllm.training.rules import LocalRule
from fedmllm.types import Broadcast


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
        """The rule with the calibration's strength."""
        return replace(rule, calibration=self.strength, labels=broadcast.population.labels if self.global_prior else {})

    def remark(self, holdings: Holdings) -> Remark | None:
        """Idle where no question has options, and beside a method that calibrates alike."""
        if holdings.calibration and holdings.options is not False:
            if self.strength == holdings.calibration and not self.global_prior:
                return Remark("the method itself calibrates by as much", idle=True)
            return Remark(f"it takes the place of the method's own calibration, whose strength is {holdings.calibration:g}", idle=False)
        if not self.strength:
            return Remark("its strength is 0", idle=True)
        if holdings.options is False:
            return Remark("no client holds a question with options, so that there is nothing to calibrate", idle=True)
        return None
