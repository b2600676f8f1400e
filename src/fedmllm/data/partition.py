"""Which client gets which sample. Pure functions of labels and a generator; results are index arrays by client."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence

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
    return by_owner(owner, num_clients)


def quantity(num_samples: int, num_clients: int, alpha: float, min_size: int, rng: np.random.Generator) -> Indices:
    """Quantity skew: the same mix of labels everywhere, sizes in proportions drawn from Dirichlet(alpha, ..., alpha).

    Arguments and errors as for ``dirichlet``.
    """
    return dirichlet([""] * num_samples, num_clients, alpha, min_size, rng)


def natural(owners: Sequence[str], num_clients: int, min_size: int) -> Indices:
    """Whoever holds a sample by nature keeps it; where there are more holders than clients, several share one.

    Holders go, the largest first, to the client that has the fewest samples so far; where there are as many as clients, in
    the order of their names.

    Args:
        owners: the natural client of each sample.
        num_clients: how many parts.
        min_size: samples every client has at least.

    Raises:
        DataError: if samples have no natural client, there are fewer than ``num_clients``, or a client stays below ``min_size``.
    """
    sizes = Counter(owners)
    if "" in sizes:
        raise DataError(
            f"federation.partition: natural needs to know whose each sample is, {sizes['']:,} of {len(owners):,} do not say; "
            "name a column with data.options.columns.client or use another partition"
        )
    if len(sizes) < num_clients:
        raise DataError(f"federation.num_clients: {num_clients} clients asked for, the samples have {len(sizes)} natural ones; lower it")
    holder = {name: i for i, name in enumerate(sorted(sizes))} if len(sizes) == num_clients else _dealt(sizes, num_clients)
    parts = by_owner(np.array([holder[name] for name in owners], dtype=np.int64), num_clients)
    if (least := min(map(len, parts))) < min_size:
        raise DataError(
            f"federation.min_partition_size: a natural client has {least} samples, {min_size} are asked for; lower either number"
        )
    return parts


def _dealt(sizes: Mapping[str, int], num_clients: int) -> dict[str, int]:
    holder, loads = {}, [(0, client) for client in range(num_clients)]
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, client = heapq.heappop(loads)
        holder[name] = client
        heapq.heappush(loads, (load + size, client))
    return holder


def by_domain(
    domains: Sequence[str], categories: Sequence[str], num_clients: int, alpha: float, min_size: int, rng: np.random.Generator
) -> Indices:
    """Domain skew: each client draws from one domain (one dataset of a mixture), label-skewed as by ``dirichlet``.

    Clients are dealt to the domains in turn, so that their numbers differ by one at most.

    Raises:
        DataError: if there are fewer clients than domains, or a domain is too small for its clients.
    """
    names, homes, labels = sorted(set(domains)), np.asarray(domains), np.asarray(categories)
    if num_clients < len(names):
        raise DataError(f"federation.num_clients: {num_clients} clients cannot hold {len(names)} domains apart; use more")
    parts: Indices = [np.empty(0, dtype=np.int64)] * num_clients
    for place, name in enumerate(names):
        rows = np.flatnonzero(homes == name)
        clients = range(place, num_clients, len(names))
        inner = dirichlet(labels[rows].tolist(), len(clients), alpha, min_size, rng)
        for client, part in zip(clients, inner, strict=True):
            parts[client] = rows[part]
    return parts


def by_owner(owner: NDArray[np.int64], num_clients: int) -> Indices:
    """Positions by owner, ascending.

    Args:
        owner: the client of each sample.
        num_clients: how many parts; some may be empty.
    """
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=num_clients))[:-1])


def _require(num_samples: int, num_clients: int, min_size: int) -> None:
    if num_samples < num_clients * min_size:
        raise DataError(
            f"federation.num_clients: {num_clients} clients of at least {min_size} samples need {num_clients * min_size} training samples, "
            f"there are {num_samples}; use fewer clients or a lower federation.min_partition_size"
        )


def _top_up(owner: NDArray[np.int64], num_clients: int, min_size: int, rng: np.random.Generator) -> None:
    """Move samples, in place, from the largest client of the moment to those below ``min_size``.

    Linear in the samples: each client's members are shuffled at most once and leave from the end.
    """
    sizes = np.bincount(owner, minlength=num_clients)
    members = by_owner(owner, num_clients)
    shuffled: dict[int, NDArray[np.int64]] = {}
    largest = [(-int(size), client) for client, size in enumerate(sizes)]
    heapq.heapify(largest)
    for client in np.flatnonzero(sizes < min_size):
        while sizes[client] < min_size:
            size, donor = heapq.heappop(largest)
            if -size != sizes[donor]:  # entry of an earlier size
                continue
            count = min(int(min_size - sizes[client]), max(1, (int(sizes[donor]) - min_size) // 2))
            if donor not in shuffled:
                shuffled[donor] = rng.permutation(members[donor])
            owner[shuffled[donor][sizes[donor] - count : sizes[donor]]] = client
            sizes[donor] -= count
            sizes[client] += count
            heapq.heappush(largest, (-int(sizes[donor]), donor))
