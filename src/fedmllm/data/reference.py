"""Reproduces the splits of the published reference code exactly: ``federation.protocol: reference``.

The code of FedMLLM (arXiv 2411.14717) uses NumPy's legacy generator and Python's ``random``, both seeded with 42. Its
weaknesses are kept, so that numbers are comparable: the split depends on the order of the rows, the last client takes what
rounding down leaves over, and a client may have a single sample. ``clean``, the default protocol, has none of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from fedmllm.data.partition import Indices

SEED = 42


def dirichlet(labels: Sequence[str], classes: Sequence[str], num_clients: int, alpha: float) -> Indices:
    """Divide samples by class: each client takes floor(share * class size) samples, in file order, and the last one takes the rest.

    The shares are a single draw of a classes x clients matrix. In the first class every client gets at least one sample,
    taken from the first client that has more than one.

    Args:
        labels: one label per row, in file order.
        classes: the classes in the order of the options.
        num_clients: number of clients.
        alpha: concentration of the Dirichlet distribution.
    """
    rng = np.random.RandomState(SEED)
    shares = rng.dirichlet(np.full(num_clients, alpha), size=len(classes))
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for row, name in enumerate(classes):
        members = [i for i, label in enumerate(labels) if label == name]
        sizes = _sizes(shares[row], len(members))
        if row == 0:
            _raise_to_one(sizes)
        start = 0
        for client, size in enumerate(sizes):
            parts[client] += members[start : start + size]
            start += size
    return [np.array(part, dtype=np.int64) for part in parts]


def _sizes(shares: np.ndarray, total: int) -> list[int]:
    sizes = [int(share * total) for share in shares[:-1]]
    return [*sizes, total - sum(sizes)]


def _raise_to_one(sizes: list[int]) -> None:
    for client in range(len(sizes)):
        if sizes[client] < 1:
            donor = next(k for k, size in enumerate(sizes) if size > 1)
            sizes[donor] -= 1
            sizes[client] += 1


def cross(num_clients: int, count: int) -> set[int]:
    """Return the positions of the clients that hold only images."""
    return set(random.Random(SEED).sample(range(num_clients), count))


def hybrid(num_clients: int, rate: float) -> list[tuple[bool, bool]]:
    """Return (holds images, holds texts) for each client."""
    draws = np.random.RandomState(SEED).rand(num_clients, 2) < rate
    return [(bool(image), bool(text)) for image, text in draws]
