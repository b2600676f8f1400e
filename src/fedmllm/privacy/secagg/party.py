"""A client's side of the protocol. It trusts its own key, the signed list of sites and its own disk, and checks everything else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import numpy as np

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg import masks
from fedmllm.privacy.secagg import statements as S
from fedmllm.privacy.secagg.messages import (
    STAGES,
    Endorsement,
    Endorsements,
    Inbox,
    MaskedVector,
    Opening,
    Peers,
    PublicKeys,
    Revealed,
    RoundId,
    SealedShares,
    Survivors,
    Vector,
)
from fedmllm.privacy.secagg.own_secrets import OwnSecrets
from fedmllm.privacy.secagg.policy import Policy, threshold
from fedmllm.privacy.secagg.used import Used


class Party:
    """One client in one session. Its methods are the stages, each of which runs once and in order; after an error it answers nothing more.

    Args:
        name: the client's name.
        key: its site's private key.
        sites: the public keys of all sites, from the signed list of sites (``roster.verify_roster``).
        round_id: the round that it trained for.
        used: the rounds that this site has masked a vector for.
        policy: its own limits.
        terms: a digest of everything else that clients must agree on, such as scale, clip norm and layout. Clients with other terms refuse
            each other's signatures.
    """

    def __init__(
        self,
        name: str,
        key: S.SiteKey,
        sites: Mapping[str, S.SitePublicKey],
        round_id: RoundId,
        used: Used,
        policy: Policy,
        terms: bytes = b"",
    ) -> None:
        self.name, self._key, self._sites, self._policy = name, key, sites, policy
        self._round, self._used, self._terms = round_id, used, terms
        self._secrets, self._next, self._session = OwnSecrets(name), STAGES[0], b""
        self._peers: Mapping[str, PublicKeys] = {}
        self._weights: Mapping[str, float] = {}
        self._survivors: list[str] = []
        self._context, self._length, self._agreed = b"", 0, b""

    def keys(self, opening: Opening) -> PublicKeys:
        """Answer with signed public keys.

        Raises:
            FederationError: if the session is for another round, or for one that was used.
        """
        self._session = self._session or opening.session
        with self._turn("keys", opening.session):
            if opening.round_id != self._round:
                raise FederationError(
                    f"the session is for {opening.round_id}, but {self.name} trained for {self._round}; nothing was masked"
                )
            self._used.require_unused(self._round)
            mask_key, share_key = self._secrets.public
            content = S.keys_statement(self._round, self._session, self._terms, self.name, mask_key, share_key)
            return PublicKeys(self._session, mask_key, share_key, S.signed(self._key, content))

    def shares(self, peers: Peers) -> SealedShares:
        """Answer with shares of the own seed and mask key, sealed for each peer.

        Raises:
            FederationError: if there are too few clients, one that is not a site, a signature that is not valid, or another threshold.
        """
        with self._turn("shares", peers.session):
            t = threshold(len(peers.keys))
            self._policy.require_enough(len(peers.keys), t, "sent keys")
            if peers.threshold != t:
                raise FederationError(f"the threshold for {len(peers.keys)} clients is {t}, got {peers.threshold}; update the server")
            own = peers.keys.get(self.name)
            if own is None or (own.mask_key, own.share_key) != self._secrets.public:
                raise FederationError(f"the server did not return the keys that {self.name} sent; nothing was masked")
            for name in sorted(peers.keys.keys() - {self.name}):
                self._require_site(name, peers.keys[name])
            self._peers = peers.keys
            self._context = S.context(self._round, self._session, self._terms, self._peers)
            return SealedShares(self._session, self._secrets.split(self._context, self._peers), self._secrets.commitment)

    def masked(self, inbox: Inbox, vector: Vector) -> MaskedVector:
        """Answer with the masked vector. The round counts as used from here on, even if the process is killed.

        Args:
            inbox: the server's message.
            vector: the client's quantized vector; it is not changed.

        Raises:
            FederationError: if there are too few clients, shares that cannot be opened, unlawful weights, or the round was used.
        """
        with self._turn("masked", inbox.session):
            group = {self.name, *inbox.sealed}
            if self.name in inbox.sealed or not group <= self._peers.keys() or inbox.weights.keys() != group:
                raise FederationError("shares and weights must be those of clients that sent keys; the server's message contradicts itself")
            self._policy.require_enough(len(group), self._threshold, "sent shares")
            self._policy.require_balanced(inbox.weights, group)
            for sender, sealed in inbox.sealed.items():
                self._secrets.open(sender, sealed)
            if vector.dtype != np.uint32 or vector.ndim != 1:
                raise FederationError(
                    f"a vector must have one dimension of uint32, got {vector.dtype} of shape {vector.shape}; quantize it"
                )
            self._weights, self._length = inbox.weights, len(vector)
            added = self._secrets.masks(inbox.sealed)
            self._used.claim(self._round)
            answer = MaskedVector(self._session, vector.copy())
            masks.add_masks(answer.vector, added)
            return answer

    def survivors(self, survivors: Survivors) -> Endorsement:
        """Answer with a signature over the clients in the sum.

        Raises:
            FederationError: if there are too few, a client that this one is not masked with, or one that dominates the sum.
        """
        with self._turn("survivors", survivors.session):
            names = sorted(set(survivors.names))
            if len(names) < len(survivors.names) or not self._weights.keys() >= set(names) >= {self.name}:
                raise FederationError(f"survivors must be distinct clients of the session, {self.name} among them, got {survivors.names}")
            self._policy.require_enough(len(names), self._threshold, "are left")
            self._policy.require_balanced(self._weights, names)
            self._survivors = names
            self._agreed = S.survivors_statement(self._context, self._weights, self._length, names)
            return Endorsement(self._session, S.signed(self._key, self._agreed))

    def unmask(self, endorsements: Endorsements) -> Revealed:
        """Answer with one share of each client: of its seed if it is in the sum, of its mask key if it is not.

        Raises:
            FederationError: if fewer than t survivors signed the survivors that this client signed.
        """
        with self._turn("unmask", endorsements.session):
            given = {name: endorsements.signatures[name] for name in self._survivors if name in endorsements.signatures}
            signed = (name for name, signature in given.items() if S.is_signed(self._sites[name], signature, self._agreed))
            # Checking a signature takes longer than all else in this stage, so it ends with enough of them.
            valid = len(list(islice(signed, self._threshold)))
            if valid < self._threshold:
                raise FederationError(
                    f"{self._threshold} clients must sign what {self.name} signed, but {valid} did; this round is skipped; if it happens again, "
                    "the server shows clients different lists or weights"
                )
            return Revealed(self._session, *self._secrets.reveal(self._survivors, self._weights.keys() - set(self._survivors)))

    @property
    def _threshold(self) -> int:
        return threshold(len(self._peers))

    @contextmanager
    def _turn(self, stage: str, session: bytes) -> Iterator[None]:
        """Check that it is a stage's turn. Unless it ends without an error, no stage has a turn after it."""
        expected, self._next = self._next, ""
        if stage != expected:
            raise FederationError(
                f"{self.name}: stages run once and in order, got {stage!r}, expected {expected or 'none, because the session has ended'!r}"
            )
        if session != self._session:
            raise FederationError(
                f"{self.name}: a message of stage {stage} belongs to another session; this session has ended for the client"
            )
        yield
        self._next = STAGES[STAGES.index(stage) + 1] if stage != STAGES[-1] else ""

    def _require_site(self, name: str, keys: PublicKeys) -> None:
        if (site := self._sites.get(name)) is None:
            raise FederationError(f"{name} is not in the signed list of sites; nothing was masked; if it is new, sign the list again")
        content = S.keys_statement(self._round, self._session, self._terms, name, keys.mask_key, keys.share_key)
        if not S.is_signed(site, keys.signature, content):
            raise FederationError(
                f"the keys of {name} are not signed by its site for {self._round} and this session; nothing was masked; they were changed or are "
                "of another session, or the settings of the two sites differ"
            )
