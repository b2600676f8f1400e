"""Partitions for scenarios that decide which modalities each client can hold: every kind of sample goes to clients that can hold it.

The medical task of the FedMLLM benchmark (arXiv 2411.14717) is divided this way: images with questions go to clients that hold images, and
texts to clients that hold texts. If samples were divided first, clients would lose the samples that they cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.partition import Indices, by_owner
from fedmllm.data.scenarios import Holdings
from fedmllm.errors import DataError, listing
from fedmllm.types import Modality, Sample

Divide = Callable[[NDArray[np.int64], int], Indices]
"""(rows, number of clients) -> for each client, positions within these rows."""


@dataclass(frozen=True)
class Holders:
    """Kinds of samples, and the clients that can hold them.

    Attributes:
        names: (domain, modalities) of each kind.
        kinds: the kind of each sample as a position in ``names``, shape (samples,).
        able: whether a client can hold a kind, shape (clients, kinds).
    """

    names: tuple[tuple[str, tuple[Modality, ...]], ...]
    kinds: NDArray[np.int64]
    able: NDArray[np.bool_]

    @classmethod
    def of(cls, samples: Sequence[Sample], clients: Sequence[str], holdings: Holdings) -> Holders:
        """Return the kinds of the samples. A client can hold a sample if it keeps at least one modality; clients without holdings can hold all."""
        found = [(sample.domain, sample.modalities) for sample in samples]
        names = tuple(sorted(set(found)))
        place = {name: i for i, name in enumerate(names)}
        able = [[client not in holdings or not kept or bool(set(kept) & set(holdings[client])) for _, kept in names] for client in clients]
        return cls(names, np.array([place[name] for name in found], dtype=np.int64), np.array(able, dtype=np.bool_))

    def at_home(self) -> Holders:
        """Restrict each client to one domain in which it can hold something. Clients with the fewest choices come first, each choosing the
        domain with the fewest clients so far."""
        domains = sorted({domain for domain, _ in self.names})
        inside = np.array([[domain == name for name, _ in self.names] for domain in domains])
        open_to = self.able @ inside.T
        residents, able = np.zeros(len(domains), dtype=np.int64), self.able.copy()
        for client in np.argsort(open_to.sum(1), kind="stable"):
            home = min(np.flatnonzero(open_to[client]), key=lambda domain: int(residents[domain]), default=None)
            if home is not None:
                residents[home] += 1
                able[client] &= inside[home]
        return Holders(self.names, self.kinds, able)

    def divided(self, divide: Divide, min_size: int, rng: np.random.Generator) -> Indices:
        """Give every sample to a client that can hold it, then move samples to clients below ``min_size``.

        Args:
            divide: divides the samples of one kind among its clients, regardless of sizes.
            min_size: minimum number of samples per client.
            rng: draws which samples move.

        Returns:
            for each client, the positions of its samples.

        Raises:
            DataError: if no client can hold a kind, or a group of clients can hold too few samples to reach ``min_size`` each.
        """
        self._require_holders()
        owner = np.empty(len(self.kinds), dtype=np.int64)
        for kind in range(len(self.names)):
            rows, clients = np.flatnonzero(self.kinds == kind), np.flatnonzero(self.able[:, kind])
            for client, part in zip(clients, divide(rows, len(clients)), strict=True):
                owner[rows[part]] = client
        self._top_up(owner, min_size, rng)
        return by_owner(owner, len(self.able))

    def _require_holders(self) -> None:
        counts = np.bincount(self.kinds, minlength=len(self.names))
        lost = [
            f"{counts[kind]:,} samples with {' and '.join(self.names[kind][1])}"
            + (f" of {self.names[kind][0]}" if self.names[kind][0] else "")
            for kind in np.flatnonzero(~self.able.any(axis=0))
        ]
        if lost:
            raise DataError(
                f"federation.scenario: no client can hold some training samples; use more clients or another level, or remove these samples:\n{listing(lost)}"
            )

    def _top_up(self, owner: NDArray[np.int64], min_size: int, rng: np.random.Generator) -> None:
        """Move samples, in place, to clients below ``min_size``, from the largest client possible and through other clients if necessary."""
        counts = np.zeros(self.able.shape, dtype=np.int64)
        np.add.at(counts, (owner, self.kinds), 1)
        for client in np.flatnonzero(counts.sum(1) < min_size):
            while (lacking := min_size - int(counts[client].sum())) > 0:
                moves = self._moves(int(client), counts, min_size)
                spare = int(counts[moves[0][2]].sum()) - min_size
                amount = min(lacking, max(1, spare // 2), *(int(counts[giver, kind]) for _, kind, giver in moves))
                for taker, kind, giver in moves:
                    rows = np.flatnonzero((owner == giver) & (self.kinds == kind))
                    owner[rng.choice(rows, size=amount, replace=False)] = taker
                    counts[giver, kind] -= amount
                    counts[taker, kind] += amount

    def _moves(self, client: int, counts: NDArray[np.int64], min_size: int) -> list[tuple[int, int, int]]:
        """Return the shortest chain of moves (taker, kind, giver) from a client above ``min_size`` to this client, starting at that giver.

        Raises:
            DataError: if there is none, because no client that could give, directly or through others, has more than ``min_size``.
        """
        sizes, reached, seen = counts.sum(1), [client], np.zeros(counts.shape[1], dtype=np.bool_)
        came: dict[int, tuple[int, int, int]] = {}
        for taker in reached:
            for kind in np.flatnonzero(self.able[taker] & ~seen):
                seen[kind] = True
                givers = [int(giver) for giver in np.flatnonzero(counts[:, kind]) if giver != client and int(giver) not in came]
                came |= {giver: (taker, int(kind), giver) for giver in givers}
                reached += givers
                largest = max(givers, key=lambda giver: int(sizes[giver]), default=client)
                if sizes[largest] > min_size:
                    chain = [came[largest]]
                    while chain[-1][0] != client:
                        chain.append(came[chain[-1][0]])
                    return chain
        held = sorted({" and ".join(kept) for (_, kept), one in zip(self.names, seen, strict=True) if one})
        raise DataError(
            f"federation.min_partition_size: {len(reached)} clients of at least {min_size} samples need {len(reached) * min_size}, but there are "
            f"only {int(sizes[reached].sum())} samples that they can hold under the scenario ({', '.join(held)}); lower it, or use fewer clients"
        )
