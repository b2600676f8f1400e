"""The whole protocol in one process, with throwaway keys."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg.messages import STAGES, Message, RoundId, Vector
from fedmllm.privacy.secagg.party import Party
from fedmllm.privacy.secagg.policy import Policy
from fedmllm.privacy.secagg.server import Server, Total
from fedmllm.privacy.secagg.used import refuse_if


class UsedInMemory:
    """The rounds that a simulated client has used."""

    def __init__(self) -> None:
        self._rounds = set[RoundId]()

    def require_unused(self, round_id: RoundId) -> None:
        """Check that a round was not used."""
        refuse_if(round_id in self._rounds, round_id)

    def claim(self, round_id: RoundId) -> None:
        """Mark a round as used."""
        self.require_unused(round_id)
        self._rounds.add(round_id)


def secure_sum(
    vectors: Mapping[str, Vector],
    length: int,
    policy: Policy | None = None,
    weights: Mapping[str, float] | None = None,
    drop: Mapping[str, Collection[str]] | None = None,
    carry: Callable[[Message], Message] = lambda message: message,
) -> Total:
    """Run a session and return the sum modulo 2^32 of the vectors of the clients that stayed until they had sent theirs.

    Args:
        vectors: a vector for each client. Each is read once, when its client masks it, so that a lazy mapping need not hold all of them.
        length: the vectors' length.
        policy: limits of all clients.
        weights: weights that clients are shown; uniform if None. Vectors are added as they are.
        drop: by stage, the clients that do not answer in that stage or later.
        carry: what a message goes through on its way.

    Raises:
        FederationError: if too few clients are left.
    """
    round_id, limits, gone = RoundId("simulated", "federated", 0), policy or Policy(), set[str]()
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in vectors}
    sites = {name: key.public_key() for name, key in keys.items()}
    shown = dict(weights or dict.fromkeys(vectors, 1 / max(len(vectors), 1)))
    parties = {name: Party(name, key, sites, round_id, UsedInMemory(), limits) for name, key in keys.items()}
    server = Server(round_id, shown, sites, length, limits.min_clients)
    for stage in STAGES:
        gone |= set((drop or {}).get(stage, ()))
        for name, message in server.begin(stage).items():
            if name in gone:
                continue
            try:
                answer = _answer(parties[name], stage, carry(message), vectors)
            except FederationError as error:
                server.drop(name, str(error))
            else:
                server.receive(name, carry(answer))
    return server.total()


def _answer(party: Party, stage: str, message: Any, vectors: Mapping[str, Vector]) -> Message:
    answer: Message = party.masked(message, vectors[party.name]) if stage == "masked" else getattr(party, stage)(message)
    return answer
