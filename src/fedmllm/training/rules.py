"""What a method changes about local training, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedmllm.types import LabelCounts, Metrics, Slots, Weights

Parameters = Mapping[str, Tensor]

Penalty = Callable[[Parameters, Parameters, float], Tensor]
"""(current parameters, what the client received, progress through its turn in [0, 1)) -> scalar."""


@dataclass(frozen=True)
class LocalResult:
    """What local training came to.

    Attributes:
        weights: all tensors, those that did not train included.
        received: what the client was sent.
        metrics: ``loss``, the mean over steps in nats per token, which is left out where no step was taken, and ``steps``.
        gradient: mean over steps of the gradient before any edit or clipping; empty unless the rule asks for it.
    """

    weights: Weights
    received: Weights
    metrics: Metrics
    gradient: Weights = field(default_factory=dict)


@dataclass(frozen=True)
class Upload:
    """What a client makes of its result.

    Attributes:
        weights: what it calls its weights; the update is their difference to what it received.
        extras: further tensors for the server, named and shaped like the update.
        keeps: what it keeps for its next turn.
    """

    weights: Weights
    extras: Slots = field(default_factory=dict)
    keeps: Slots = field(default_factory=dict)


def plain_upload(result: LocalResult) -> Upload:
    """The result itself."""
    return Upload(result.weights)


@dataclass(frozen=True)
class LocalRule:
    """How a method departs from plain local training. The neutral values are FedAvg.

    Attributes:
        penalty: added to every step's loss.
        edit_gradient: replaces a gradient before clipping: (name, gradient) -> gradient.
        trains: which tensors train; all for None.
        start: tensors that begin elsewhere than at what the client received.
        own: names of the tensors that the client keeps for itself: what it received of them is nobody's, and no strategy pulls towards it.
        records_gradient: whether ``LocalResult.gradient`` is wanted.
        alignment: weight of the loss that makes a complete sample and its copy with a modality less answer alike.
        calibration: strength of the calibration to labels (``training.calibration``).
        labels: whose frequencies it takes; the client's own where empty.
        finish: result -> what is sent and kept.
        personal: a second pass over the same samples, whose weights the client keeps under ``personal``.
    """

    penalty: Penalty | None = None
    edit_gradient: Callable[[str, Tensor], Tensor] | None = None
    trains: Callable[[str], bool] | None = None
    start: Weights = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    records_gradient: bool = False
    alignment: float = 0.0
    calibration: float = 0.0
    labels: LabelCounts = field(default_factory=dict)
    finish: Callable[[LocalResult], Upload] = plain_upload
    personal: LocalRule | None = None

    def with_penalty(self, penalty: Penalty) -> LocalRule:
        """The same rule with one more penalty, on what clients share."""
        first, own = self.penalty, self.own

        def shared(now: Parameters, received: Parameters, progress: float) -> Tensor:
            return penalty({name: tensor for name, tensor in now.items() if name not in own}, received, progress)

        if first is None:
            return replace(self, penalty=shared)
        return replace(self, penalty=lambda now, received, progress: first(now, received, progress) + shared(now, received, progress))
