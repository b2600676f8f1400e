"""The interface of loss terms, which methods and strategies add to a client's loss."""

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
"""Tensors by parameter name, on the model's device."""


@dataclass(frozen=True)
class TermStep:
    """One optimizer step of one client, for terms that pass samples through the model.

    Attributes:
        vlm: the model, with the client's adapters active.
        samples: the samples of the step, as prepared by the rule's terms.
        rng: the term's random numbers. A step that is repeated after running out of memory draws the same numbers again.
        max_tokens: maximum number of tokens in a forward pass, padding included.
    """

    vlm: VisionLanguageModel
    samples: Sequence[Encoded]
    rng: np.random.Generator
    max_tokens: int


class LossTerm:
    """Base class of terms added to the loss. It adds nothing; a term overrides the hooks that it needs.

    ``prepare`` is called once before a client trains. In every optimizer step, ``backward`` is called after the passes of the loss, and
    then ``value``. One term may serve several clients at once, so it must hold only hyperparameters and nothing that changes.
    """

    @property
    def name(self) -> str:
        """Name of the term's random numbers and of the companions it attaches to samples; by default the class name."""
        return type(self).__name__

    @property
    def has_passes(self) -> bool:
        """Whether the term passes samples through the model, i.e. whether its class overrides ``backward``."""
        return type(self).backward is not LossTerm.backward

    @property
    def prepares_samples(self) -> bool:
        """Whether the term may change samples, i.e. whether its class overrides ``prepare``."""
        return type(self).prepare is not LossTerm.prepare

    def prepare(self, vlm: VisionLanguageModel, encoder: Encoder, samples: Sequence[Sample], encoded: list[Encoded]) -> list[Encoded]:
        """Prepare a client's samples before it trains, for example by adding ``companions`` or an ``option_bias``.

        Args:
            vlm: the model.
            encoder: encodes additional samples.
            samples: the client's samples.
            encoded: the same samples in the same order, as prepared by earlier terms.

        Returns:
            the prepared samples, in the same order.
        """
        return encoded

    def backward(self, step: TermStep) -> None:
        """Pass samples through the model and add the term's gradients to those of the client's parameters.

        If a pass does not fit into memory, the step's gradients are discarded and this method is called again for the same step.
        """

    def value(self, now: Parameters, received: Parameters, progress: float) -> Tensor | None:
        """Return a penalty on the parameters.

        Args:
            now: the current values of the parameters that train.
            received: the weights that the client received.
            progress: the finished share of the client's local training, in [0, 1).

        Returns:
            a scalar; None for no penalty.
        """
        return None


_Kind = TypeVar("_Kind", bound=LossTerm)


def of_kind(terms: Iterable[LossTerm], kind: type[_Kind]) -> _Kind | None:
    """Return the first term of a class; None if there is none."""
    return next((term for term in terms if isinstance(term, kind)), None)
