"""The server's side of the protocol. It sees public keys, sealed shares, masked vectors, and one share of each client from each client."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedmllm.errors import FederationError, listing
from fedmllm.privacy.secagg import masks
from fedmllm.privacy.secagg import statements as S
from fedmllm.privacy.secagg.messages import (
    STAGES,
    UP,
    Endorsement,
    Endorsements,
    Inbox,
    MaskedVector,
    Message,
    Opening,
    Peers,
    PublicKeys,
    Revealed,
    RoundId,
    SealedShares,
    Survivors,
    Vector,
)
from fedmllm.privacy.secagg.policy import threshold
from fedmllm.privacy.secagg.unmasking import pair_masks, seed_mask


class Total(NamedTuple):
    """The result of a session.

    Attributes:
        vector: the sum of the survivors' vectors modulo 2^32.
        survivors: the clients in it, by name.
    """

    vector: Vector
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Dropped:
    """A client that left a session.

    Attributes:
        client: its name.
        stage: the first stage that it did not complete.
        reason: why.
    """

    client: str
    stage: str
    reason: str


class Server:
    """One session: for each stage, ``begin`` it, send its messages, and give the answers to ``receive``, or ``drop`` clients without one.

    ``total`` is the result. Masked vectors are added when they are received, so that memory does not grow with the number of clients.
    Answers that are late, repeated or from clients that were not asked are ignored. An answer that is not valid drops its client.

    Args:
        round_id: the round.
        weights: the weight of each invited client in the sum; they sum to at most 1.
        sites: the sites' public keys.
        length: the vectors' length.
        min_clients: the smallest number of clients in the sum.
        terms: see ``Party``.

    Attributes:
        dropped: the clients that left, in order. A client may have left after its vector was added.
    """

    def __init__(
        self,
        round_id: RoundId,
        weights: Mapping[str, float],
        sites: Mapping[str, S.SitePublicKey],
        length: int,
        min_clients: int,
        terms: bytes = b"",
    ) -> None:
        self._round, self._weights, self._sites, self._terms = round_id, dict(weights), sites, terms
        self._length, self._min_clients = length, min_clients
        self._session, self._context, self._agreed = secrets.token_bytes(16), b"", b""
        self.dropped: list[Dropped] = []
        self._stage, self._outstanding, self._answered = "", set[str](), set(self._weights)
        self._peers: dict[str, PublicKeys] = {}
        self._sealed: dict[str, SealedShares] = {}
        self._sum: Vector = np.zeros(length, np.uint32)
        self._survivors: list[str] = []
        self._signatures: dict[str, bytes] = {}
        self._revealed: dict[str, Revealed] = {}

    @property
    def survivors(self) -> tuple[str, ...]:
        """The clients whose vectors are in the sum, by name; empty before stage ``survivors``."""
        return tuple(self._survivors)

    @property
    def weights(self) -> dict[str, float]:
        """The weights that clients are shown in stage ``masked``: those of the clients that sent shares."""
        return {name: self._weights[name] for name in self._sealed}

    def begin(self, stage: str) -> dict[str, Message]:
        """End the stage before and return this stage's message for each client that is still in the session.

        Raises:
            FederationError: if too few clients are left, or it is not the next stage.
        """
        self._require_next(stage)
        asked = self._end()
        messages = self._messages(stage, asked)
        self._stage, self._outstanding, self._answered = stage, set(asked), set()
        return messages

    def receive(self, client: str, message: Message) -> None:
        """Take a client's answer."""
        if client not in self._outstanding:
            return
        try:
            self._take(client, message)
        except FederationError as error:
            self.drop(client, str(error))
            return
        self._outstanding.discard(client)
        self._answered.add(client)

    def drop(self, client: str, reason: str) -> None:
        """Note that a client does not answer this stage, for example because it failed. It is asked nothing more."""
        if client in self._outstanding:
            self._outstanding.discard(client)
            self.dropped.append(Dropped(client, self._stage, reason))

    def total(self) -> Total:
        """End the last stage, remove the masks that are left in the sum, and return it.

        Raises:
            FederationError: if too few clients are left, or their shares do not give a secret back.
        """
        self._require_next("")
        shown, self._stage = self._end()[: self._threshold], "total"
        points = {name: point for point, name in enumerate(sorted(self._peers), 1)}
        left = []
        for name in self._survivors:
            shares = {points[peer]: self._revealed[peer].seeds[name] for peer in shown}
            left.append(seed_mask(name, self._context, self._sealed[name].commitment, shares))
        for name in self._missing:
            shares = {points[peer]: self._revealed[peer].mask_keys[name] for peer in shown}
            left += pair_masks(name, self._context, {peer: self._peers[peer] for peer in (name, *self._survivors)}, shares)
        masks.add_masks(self._sum, [mask.inverse() for mask in left])
        return Total(self._sum, tuple(self._survivors))

    @property
    def _threshold(self) -> int:
        return threshold(len(self._peers))

    @property
    def _missing(self) -> list[str]:
        """The clients that survivors are masked with, but whose vectors are not in the sum."""
        return sorted(self._sealed.keys() - set(self._survivors))

    def _require_next(self, stage: str) -> None:
        """Check that a stage comes next; an empty name stands for the total."""
        order = ("", *STAGES, "")
        if self._stage not in order or order[order.index(self._stage) + 1] != stage:
            raise FederationError(
                f"a session runs {', '.join(STAGES)} and the total once and in order; {stage or 'the total'} does not follow {self._stage or 'the start'}"
            )

    def _messages(self, stage: str, asked: list[str]) -> dict[str, Message]:
        """Return the messages of a stage to the clients that are asked."""
        if stage == "masked":
            return {name: self._inbox(name) for name in asked}
        if stage == "keys":
            return dict.fromkeys(asked, Opening(self._session, self._round))
        if stage == "shares":
            return dict.fromkeys(asked, self._begin_shares())
        if stage == "survivors":
            return dict.fromkeys(asked, self._begin_survivors(asked))
        return dict.fromkeys(asked, Endorsements(self._session, self._signatures))

    def _end(self) -> list[str]:
        """End the stage. Return the clients that completed it."""
        for name in sorted(self._outstanding):
            self.drop(name, "no answer")
        # From stage survivors on, clients in the sum may leave as long as t of them remain.
        need = self._threshold if self._stage in STAGES[3:] else max(self._min_clients, self._threshold)
        if len(self._answered) < need:
            gone = listing(f"{row.client} (stage {row.stage}): {row.reason}" for row in self.dropped)
            raise FederationError(
                f"{self._round}: secure aggregation needs at least {need} clients after stage {self._stage or 'train'}, but "
                f"{len(self._answered)} are left; the round is skipped; invite more clients, or wait longer for answers"
                + (f"; clients that left:\n{gone}" if gone else "")
            )
        return sorted(self._answered)

    def _take(self, client: str, message: Message) -> None:
        """Check and keep an answer."""
        if not isinstance(message, UP[self._stage]):
            raise FederationError(f"the answer is {type(message).__name__}, expected {UP[self._stage].__name__}")
        if message.session != self._session:
            raise FederationError("the answer belongs to another session")
        if isinstance(message, PublicKeys):
            self._take_keys(client, message)
        elif isinstance(message, SealedShares):
            _require_names(message.sealed, self._peers.keys() - {client})
            self._sealed[client] = message
        elif isinstance(message, MaskedVector):
            self._take_vector(message.vector)
        elif isinstance(message, Endorsement):
            if not S.is_signed(self._sites[client], message.signature, self._agreed):
                raise FederationError("its signature over the survivors is not valid")
            self._signatures[client] = message.signature
        elif isinstance(message, Revealed):
            _require_names(message.seeds, self._survivors)
            _require_names(message.mask_keys, self._missing)
            self._revealed[client] = message

    def _take_keys(self, client: str, keys: PublicKeys) -> None:
        if client not in self._sites:
            raise FederationError("it is not in the list of sites")
        content = S.keys_statement(self._round, self._session, self._terms, client, keys.mask_key, keys.share_key)
        if not S.is_signed(self._sites[client], keys.signature, content):
            raise FederationError("its site did not sign its keys, or its settings differ from the server's")
        if not (masks.is_usable(keys.mask_key) and masks.is_usable(keys.share_key)):
            raise FederationError("its keys make secrets predictable")
        self._peers[client] = keys

    def _take_vector(self, vector: Vector) -> None:
        if vector.dtype != np.uint32 or vector.shape != (self._length,):
            raise FederationError(f"its vector is {vector.dtype} of shape {vector.shape}, expected uint32 of shape ({self._length},)")
        self._sum += vector

    def _begin_shares(self) -> Peers:
        self._context = S.context(self._round, self._session, self._terms, self._peers)
        return Peers(self._session, self._peers, self._threshold)

    def _inbox(self, client: str) -> Inbox:
        sealed = {sender: shares.sealed[client] for sender, shares in self._sealed.items() if sender != client}
        return Inbox(self._session, sealed, self.weights)

    def _begin_survivors(self, survivors: list[str]) -> Survivors:
        self._survivors = survivors
        self._agreed = S.survivors_statement(self._context, self.weights, self._length, survivors)
        return Survivors(self._session, tuple(survivors))


def _require_names(found: Iterable[str], expected: Iterable[str]) -> None:
    if set(found) != set(expected):
        raise FederationError(f"its shares are for {sorted(found)}, expected {sorted(expected)}")
