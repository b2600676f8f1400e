"""Partitions of samples over clients: pure functions of labels and a generator that return one index array for each client."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedmllm.errors import DataError

Indices = list[NDArray[np.int64]]


def iid(num_samples: int, num_clients: int, min_size: int, rng: np.random.Generator) -> Indices:
    """Divide samples at random among clients whose sizes differ by at most one.

    Raises:
        DataError: if there are fewer than ``num_clients * min_size`` samples.
    """
    _require(num_samples, num_clients, min_size)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_samples), num_clients)]


def dirichlet(categories: Sequence[str], num_clients: int, alpha: float, min_size: int, rng: np.random.Generator) -> Indices:
    """Divide samples with label skew: proportions of each category are drawn from Dirichlet(alpha, ..., alpha).

    A small alpha gives each category to few clients; a large alpha gives all clients the same mix (Hsu et al., 2019,
    arXiv 1909.06335). Clients below ``min_size`` then get random samples of the largest clients.

    Args:
        categories: one category per sample.
        num_clients: number of clients.
        alpha: concentration, greater than 0.
        min_size: minimum number of samples per client.
        rng: draws proportions and samples.

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
    """Divide samples with quantity skew: client sizes are drawn from Dirichlet(alpha, ..., alpha), with the same mix of labels.

    Arguments and errors are those of ``dirichlet``.
    """
    return dirichlet([""] * num_samples, num_clients, alpha, min_size, rng)


def natural(owners: Sequence[str], num_clients: int, min_size: int) -> Indices:
    """Divide samples by their natural clients. If there are more of these than clients, several share one client.

    Natural clients are assigned, largest first, to the client with the fewest samples so far. If their number equals ``num_clients``,
    they are assigned in the order of their names.

    Args:
        owners: the natural client of each sample.
        num_clients: number of clients.
        min_size: minimum number of samples per client.

    Raises:
        DataError: if samples have no natural client, there are fewer than ``num_clients``, or a client stays below ``min_size``.
    """
    sizes = Counter(owners)
    if "" in sizes:
        raise DataError(
            f"federation.partition: natural needs a client for each sample, but {sizes['']:,} of {len(owners):,} samples have none; "
            "name a column with data.options.columns.client or use another partition"
        )
    if len(sizes) < num_clients:
        raise DataError(
            f"federation.num_clients: {num_clients} clients requested, but the samples have only {len(sizes)} natural clients; lower it"
        )
    holder = {name: i for i, name in enumerate(sorted(sizes))} if len(sizes) == num_clients else _dealt(sizes, num_clients)
    parts = by_owner(np.array([holder[name] for name in owners], dtype=np.int64), num_clients)
    if (least := min(map(len, parts))) < min_size:
        raise DataError(
            f"federation.min_partition_size: a natural client has {least} samples, but the minimum is {min_size}; "
            "lower it or federation.num_clients"
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
    """Divide samples with domain skew: each client holds one domain (a dataset of a mixture), with label skew as in ``dirichlet``.

    Clients are assigned to the domains in rotation, so that the numbers of clients per domain differ by at most one.

    Raises:
        DataError: if there are fewer clients than domains, or a domain is too small for its clients.
    """
    names, homes, labels = sorted(set(domains)), np.asarray(domains), np.asarray(categories)
    if num_clients < len(names):
        raise DataError(f"federation.num_clients: {num_clients} clients cannot hold {len(names)} separate domains; use more clients")
    parts: Indices = [np.empty(0, dtype=np.int64)] * num_clients
    for place, name in enumerate(names):
        rows = np.flatnonzero(homes == name)
        clients = range(place, num_clients, len(names))
        inner = dirichlet(labels[rows].tolist(), len(clients), alpha, min_size, rng)
        for client, part in zip(clients, inner, strict=True):
            parts[client] = rows[part]
    return parts


def by_owner(owner: NDArray[np.int64], num_clients: int) -> Indices:
    """Return the positions of each client's samples, ascending.

    Args:
        owner: the client of each sample.
        num_clients: number of clients, some of which may have no samples.
    """
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=num_clients))[:-1])


def _require(num_samples: int, num_clients: int, min_size: int) -> None:
    if num_samples < num_clients * min_size:
        raise DataError(
            f"federation.num_clients: {num_clients} clients of at least {min_size} samples need {num_clients * min_size} training samples, "
            f"but there are {num_samples}; use fewer clients or a lower federation.min_partition_size"
        )


def _top_up(owner: NDArray[np.int64], num_clients: int, min_size: int, rng: np.random.Generator) -> None:
    """Move samples, in place, from the currently largest client to clients below ``min_size``.

    The time is linear in the number of samples, because each client's samples are shuffled at most once and taken from the end.
    """
    sizes = np.bincount(owner, minlength=num_clients)
    members = by_owner(owner, num_clients)
    shuffled: dict[int, NDArray[np.int64]] = {}
    largest = [(-int(size), client) for client, size in enumerate(sizes)]
    heapq.heapify(largest)
    for client in np.flatnonzero(sizes < min_size):
        while sizes[client] < min_size:
            size, donor = heapq.heappop(largest)
            if -size != sizes[donor]:  # outdated entry
                continue
            count = min(int(min_size - sizes[client]), max(1, (int(sizes[donor]) - min_size) // 2))
            if donor not in shuffled:
                shuffled[donor] = rng.permutation(members[donor])
            owner[shuffled[donor][sizes[donor] - count : sizes[donor]]] = client
            sizes[donor] -= count
            sizes[client] += count
            heapq.heappush(largest, (-int(sizes[donor]), donor))
