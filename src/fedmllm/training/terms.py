"""What a method or a strategy adds to a client's loss: a term, in a class of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from fedmllm.models.encoding import Encoded
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder
from fedmllm.types import Sample

Parameters = Mapping[str, Tensor]
"""Tensors by name, on the model's device."""


@dataclass(frozen=True)
class TermStep:
    """One optimizer step of one client, as a term that passes samples through the model sees it.

    Attributes:
        vlm: the model; what goes through it goes through the client's adapters.
        samples: those of the step, as the rule's terms prepared them.
        rng: for what the term draws; the same again if the step is repeated for lack of memory.
        max_tokens: padded tokens of one forward pass.
    """

    vlm: VisionLanguageModel
    samples: Sequence[Encoded]
    rng: np.random.Generator
    max_tokens: int


class LossTerm:
    """A term beside the loss of the answers. This one adds nothing: a term overrides the hooks that it needs.

    ``prepare`` is called once before a client trains; in every optimizer step ``backward`` follows the passes of the loss, and ``value``
    follows that. A term may be asked about several clients at once, so it holds hyper-parameters and nothing that changes.
    """

    @property
    def name(self) -> str:
        """Names its random numbers and the companions it gives to samples; the name of the class."""
        return type(self).__name__

    @property
    def has_passes(self) -> bool:
        """Whether it passes samples through the model: whether its class overrides ``backward``."""
        return type(self).backward is not LossTerm.backward

    def prepare(self, vlm: VisionLanguageModel, encoder: Encoder, samples: Sequence[Sample], encoded: list[Encoded]) -> list[Encoded]:
        """What it needs of a client's samples before the client trains.

        Args:
            vlm: the model.
            encoder: turns further samples into tensors.
            samples: the client's.
            encoded: the same samples in the same order, as the terms before this one prepared them.

        Returns:
            one for each sample, in the same order: with ``companions`` or ``option_bias``, for instance.
        """
        return encoded

    def backward(self, step: TermStep) -> None:
        """Add the gradients of what it computes by passes of the model to those of the client's parameters.

        It may be called again for the same step, if a pass did not fit the memory; the gradients of the first call are gone then.
        """

    def value(self, now: Parameters, received: Parameters, progress: float) -> Tensor | None:
        """A penalty on the parameters.

        Args:
            now: the parameters that train.
            received: what the client was sent.
            progress: how much of the client's training is done, in [0, 1).

        Returns:
            a scalar; None for no penalty.
        """
        return None


_Kind = TypeVar("_Kind", bound=LossTerm)


def of_kind(terms: Iterable[LossTerm], kind: type[_Kind]) -> _Kind | None:
    """The first term of a class; None if there is none."""
    return next((term for term in terms if isinstance(term, kind)), None)
