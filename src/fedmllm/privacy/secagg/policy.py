"""What a client demands of a session before it answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedmllm.errors import ConfigError, FederationError

_SLACK = 1e-9
"""Weights are quotients of sample counts; their sum may exceed 1 by rounding."""


def threshold(num_clients: int) -> int:
    """Return t, the number of shares that give a secret back: ``floor(2n / 3) + 1``."""
    return 2 * num_clients // 3 + 1


@dataclass(frozen=True)
class Policy:
    """A client's own limits. A server cannot change them.

    Attributes:
        min_clients: the smallest number of clients in a sum.
        largest_share: the largest share of a sum that one client's weight may have. A sum with the share 1 would be that client's update.

    Raises:
        ConfigError: if a value is out of range.
    """

    min_clients: int = 2
    largest_share: float = 0.8

    def __post_init__(self) -> None:
        if self.min_clients < 2:
            raise ConfigError(f"min_clients must be at least 2, because a sum of one client hides nothing, got {self.min_clients}")
        if not 0 < self.largest_share < 1:
            raise ConfigError(f"largest_share must be in (0, 1), got {self.largest_share:g}")

    def require_enough(self, num_clients: int, threshold: int, what: str) -> None:
        """Check a number of clients.

        Raises:
            FederationError: if there are fewer than ``min_clients`` or than the threshold.
        """
        need = max(self.min_clients, threshold)
        if num_clients < need:
            raise FederationError(
                f"a session needs at least {need} clients (min_clients {self.min_clients}, threshold {threshold}), but {num_clients} {what}; "
                "this round is skipped; invite more clients, or wait until more are connected"
            )

    def require_balanced(self, weights: Mapping[str, float], clients: Collection[str]) -> None:
        """Check the weights of the clients in a sum.

        Raises:
            FederationError: if one client's share of the sum is too large, or the weights of all clients sum to more than 1.
        """
        if (total := math.fsum(weights.values())) > 1 + _SLACK:
            raise FederationError(f"weights in a sum must sum to at most 1, got {total:.6g}; the server must divide them by their sum")
        chosen = {name: weights[name] for name in clients}
        heaviest, total = max(chosen, key=chosen.__getitem__), math.fsum(chosen.values())
        if not chosen[heaviest] <= self.largest_share * total * (1 + _SLACK) or total == 0:
            share = chosen[heaviest] / total if total else math.nan
            raise FederationError(
                f"one client may have at most {self.largest_share:g} of a sum's weight, but {heaviest} has {share:.6g}, which would show its update; "
                "weigh clients uniformly, invite more clients, or raise largest_share at every site"
            )
