"""Clients' tensors as integers, and what all clients of a session must agree on about them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from fedmllm.errors import FederationError
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.secagg.layout import Layout
from fedmllm.privacy.secagg.messages import Vector
from fedmllm.privacy.secagg.quantize import Private, Weighted
from fedmllm.privacy.secagg.statements import digest
from fedmllm.types import Slots, Weights


@dataclass(frozen=True)
class Encoding:
    """How the clients of a run turn their tensors into integers.

    Without differential privacy, the mean over the clients S in the sum is

        mean = (sum_{k in S} round(p_k x_k scale) / scale) / sum_{k in S} p_k

    where p_k is a client's weight; the weights in a session sum to at most 1. With it, clipped tensors are added without weights.

    Attributes:
        quantizer: the integers.
        noisy: whether each client adds noise; only with ``Private``.
        source: the noise of clients in this process. Clients at sites have their own.
    """

    quantizer: Weighted | Private
    noisy: bool = False
    source: Noise = field(default_factory=Noise)

    def terms(self, layout: Layout) -> bytes:
        """Return the digest of everything that clients must agree on, for ``Party`` and ``Server``."""
        q = self.quantizer
        if isinstance(q, Weighted):
            return digest("terms", layout.digest, q.scale)
        numbers = (q.clip_norm, q.noise_multiplier, q.num_clients, q.min_clients, q.assumed_colluders)
        return digest("terms", layout.digest, q.scale, *numbers, int(self.noisy))

    def vector(self, slots: Slots, client: str, weights: Mapping[str, float], uniform: Collection[str] = ()) -> Vector:
        """Return a client's integers.

        Args:
            slots: its tensors by kind.
            client: its name.
            weights: the weights p_k of the clients of the session.
            uniform: kinds that every client weighs by ``1 / len(weights)`` instead.

        Raises:
            FederationError: if an entry is out of range or not a number.
        """
        if isinstance(self.quantizer, Private):
            flat = Layout.of(slots).flat(slots)
            return self.quantizer.noisy(flat, self.source) if self.noisy else self.quantizer.integers(flat)
        parts = []
        for kind in sorted(slots):
            one = {kind: slots[kind]}
            weight = 1 / len(weights) if kind in uniform else weights[client]
            parts.append(self.quantizer.integers(Layout.of(one).flat(one), weight))
        return np.concatenate(parts)

    def require(self, slots: Slots) -> None:
        """Check a client's tensors before its session, while it can still be left out.

        Raises:
            FederationError: if an entry is out of range or not a number.
            ConfigError: if there are so many entries that clipping would leave nothing.
        """
        replace(self, noisy=False).vector(slots, "", {"": 0.0})

    def sums(self, layout: Layout, total: Vector) -> dict[str, Weights]:
        """Return the sums by kind, in float64, without their weights."""
        return layout.slots(self.quantizer.floats(total))

    def means(
        self, layout: Layout, total: Vector, survivors: Collection[str], weights: Mapping[str, float], uniform: Collection[str] = ()
    ) -> dict[str, Weights]:
        """Return the means over the clients in the sum by kind, in float64. The other arguments are those of ``vector``."""
        share = math.fsum(weights[name] for name in survivors)
        found = {}
        for kind, tensors in self.sums(layout, total).items():
            divisor = len(survivors) / len(weights) if kind in uniform else share
            found[kind] = {name: tensor / divisor for name, tensor in tensors.items()}
        return found


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Return weights divided by their sum.

    Raises:
        FederationError: if no weight is positive.
    """
    if (total := math.fsum(weights.values())) <= 0:
        raise FederationError("no update has a positive weight, so there is no sum; check that the cohort's clients hold samples")
    return {name: weight / total for name, weight in weights.items()}
