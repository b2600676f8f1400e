"""Which client gets which sample. Pure functions of labels and a generator; results are index arrays by client."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmllm.errors import DataError

Indices = list[NDArray[np.int64]]


def iid(num_samples: int, num_clients: int, min_size: int, rng: np.random.Generator) -> Indices:
    """A random split into clients whose sizes differ by one at most.

    Raises:
        DataError: if there are fewer than ``num_clients * min_size`` samples.
    """
    _require(num_samples, num_clients, min_size)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_samples), num_clients)]


def dirichlet(categories: Sequence[str], num_clients: int, alpha: float, min_size: int, rng: np.random.Generator) -> Indices:
    """Label skew: each category is spread over the clients by proportions drawn from Dirichlet(alpha, ..., alpha).

    Small alpha gives each category to few clients, large alpha gives all clients the same mix (Hsu et al., 2019,
    arXiv 1909.06335). Clients below ``min_size`` are then topped up with random samples of the largest clients.

    Args:
        categories: one per sample.
        num_clients: how many parts.
        alpha: concentration, above 0.
        min_size: samples every client has at least.
        rng: draws proportions and members.

    Raises:
        DataError: if there are fewer than ``num_clients * min_size`` samples.
    """
    _require(len(categories), num_clients, min_size)
    labels = np.asarray(categories)
    owner = np.empty(len(labels), dtype=np.int64)
    for category in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == category))
        shares = rng.dirichlet(np.full(num_clients, alpha))
        cuts = np.floor(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        owner[members] = np.repeat(np.arange(num_clients), np.diff(cuts, prepend=0, append=len(members)))
    _top_up(owner, num_clients, min_size, rng)
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=num_clients))[:-1])


def _require(num_samples: int, num_clients: int, min_size: int) -> None:
    if num_samples < num_clients * min_size:
        raise DataError(
            f"federation.num_clients: {num_clients} clients of at least {min_size} samples need {num_clients * min_size} training samples, "
            f"there are {num_samples}; use fewer clients or a lower federation.min_partition_size"
        )


def _top_up(owner: NDArray[np.int64], num_clients: int, min_size: int, rng: np.random.Generator) -> None:
    """Move samples, in place, from the largest client of the moment to those below ``min_size``."""
    sizes = np.bincount(owner, minlength=num_clients)
    for client in np.flatnonzero(sizes < min_size):
        while sizes[client] < min_size:
            donor = int(sizes.argmax())
            count = min(min_size - sizes[client], max(1, (sizes[donor] - min_size) // 2))
            moved = rng.choice(np.flatnonzero(owner == donor), size=count, replace=False)
            owner[moved] = client
            sizes[donor] -= count
            sizes[client] += count
