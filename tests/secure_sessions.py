"""Sessions of secure aggregation that a test can stop and manipulate at any message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedmllm.privacy.secagg.messages import STAGES, Message, RoundId, Vector
from fedmllm.privacy.secagg.party import Party
from fedmllm.privacy.secagg.policy import Policy
from fedmllm.privacy.secagg.server import Server
from fedmllm.privacy.secagg.simulate import UsedInMemory
from fedmllm.privacy.secagg.used import Used

ROUND = RoundId("run", "federated", 3)
KEYS = [ec.generate_private_key(ec.SECP384R1()) for _ in range(12)]
"""Keys of sites a, b, c, ..."""
Change = Callable[[str, Any], Any]


def vectors(count: int, length: int, seed: int = 0) -> dict[str, Vector]:
    """Return uniform vectors of clients a, b, c, ..."""
    rng = np.random.default_rng(seed)
    return {chr(97 + i): rng.integers(0, 2**32, length, dtype=np.uint32) for i in range(count)}


def plain_sum(given: Mapping[str, Vector], names: Any) -> Vector:
    """Return the sum of some vectors modulo 2^32, in Python's integers."""
    rows = [given[name].tolist() for name in names]
    return np.array([sum(column) % 2**32 for column in zip(*rows, strict=True)], np.uint32)


class Session:
    """A server and its clients a, b, c, ... in one process.

    Args:
        count: number of clients.
        policy: limits of all clients.
        round_id: the round.
        used: by client, the rounds it has used; in memory if missing.
        weights: weights by client; uniform if None.
    """

    def __init__(
        self,
        count: int = 4,
        policy: Policy | None = None,
        round_id: RoundId = ROUND,
        used: Mapping[str, Used] | None = None,
        weights: Mapping[str, float] | None = None,
        terms: Mapping[str, bytes] | None = None,
    ) -> None:
        self.vectors = vectors(count, 50)
        self.keys = dict(zip(self.vectors, KEYS, strict=False))
        self.sites = {name: key.public_key() for name, key in self.keys.items()}
        limits = policy or Policy()
        stores = used or {}
        self.parties = {
            name: Party(name, key, self.sites, round_id, stores.get(name, UsedInMemory()), limits, (terms or {}).get(name, b""))
            for name, key in self.keys.items()
        }
        self.server = Server(round_id, weights or dict.fromkeys(self.keys, 1 / count), self.sites, 50, limits.min_clients)

    def answer(self, name: str, stage: str, message: Any) -> Any:
        """Return a client's answer to a stage's message."""
        if stage == "masked":
            return self.parties[name].masked(message, self.vectors[name])
        return getattr(self.parties[name], stage)(message)

    def down(self, stage: str) -> dict[str, Any]:
        """Run all stages before one; return the server's messages of that stage."""
        for before in STAGES[: STAGES.index(stage)]:
            self.up(before, self.server.begin(before))
        return dict(self.server.begin(stage))

    def up(self, stage: str, messages: Mapping[str, Message], change: Change = lambda name, answer: answer) -> None:
        """Let the clients answer the messages of a stage; a change may replace an answer or, with None, lose it."""
        for name, message in messages.items():
            if (answer := change(name, self.answer(name, stage, message))) is not None:
                self.server.receive(name, answer)

    def run(self, changes: Mapping[str, Change] | None = None) -> Any:
        """Run the session with changes to the answers of some stages."""
        for stage in STAGES:
            self.up(stage, self.server.begin(stage), (changes or {}).get(stage, lambda name, answer: answer))
        return self.server.total()
