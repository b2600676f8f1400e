"""The secrets of one client in one session: two X25519 keys, the seed of its own mask, and the shares that its peers gave it."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Mapping

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg import masks, shamir
from fedmllm.privacy.secagg.messages import PublicKeys
from fedmllm.privacy.secagg.policy import threshold

_SHARE = 66


class OwnSecrets:
    """Secrets that only live in memory. None of them outlives its session.

    Args:
        name: the client's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._mask_key, self._share_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(32)
        self._context = b""
        self._peers: Mapping[str, PublicKeys] = {}
        self._agreed: dict[str, bytes] = {}
        self._key_shares: dict[str, bytes] = {}
        self._seed_shares: dict[str, bytes] = {}

    @property
    def public(self) -> tuple[bytes, bytes]:
        """The public mask key and the public share key."""
        return self._mask_key.public_key().public_bytes_raw(), self._share_key.public_key().public_bytes_raw()

    @property
    def commitment(self) -> bytes:
        """The digest by which the server recognizes the seed."""
        return commitment(self._seed)

    def split(self, context: bytes, peers: Mapping[str, PublicKeys]) -> dict[str, bytes]:
        """Return sealed shares of the mask key and of the seed for each peer. A client's own shares stay here.

        Args:
            context: the session's context.
            peers: the keys of all clients, this one included. Their order by name gives the shares' points.

        Raises:
            FederationError: if a peer's key is unusable.
        """
        self._context, self._peers = context, peers
        names, t = sorted(peers), threshold(len(peers))
        key_shares, seed_shares = (shamir.split(secret, t, len(names)) for secret in (self._mask_key.private_bytes_raw(), self._seed))
        sealed = {}
        for name, key_share, seed_share in zip(names, key_shares, seed_shares, strict=True):
            if name == self.name:
                self._key_shares[name], self._seed_shares[name] = key_share, seed_share
                continue
            self._agreed[name] = self._agree(self._share_key, name, peers[name].share_key)
            sealed[name] = masks.seal(self._agreed[name], context, self.name, name, key_share + seed_share)
        return sealed

    def open(self, sender: str, sealed: bytes) -> None:
        """Keep a peer's shares.

        Raises:
            FederationError: if they cannot be opened.
        """
        try:
            content = masks.unseal(self._agreed[sender], self._context, sender, self.name, sealed)
        except ValueError as error:
            raise FederationError(
                f"the shares of {sender} for {self.name} cannot be opened: {error}; exclude that site if it happens again"
            ) from error
        self._key_shares[sender], self._seed_shares[sender] = content[:_SHARE], content[_SHARE:]

    def masks(self, peers: Iterable[str]) -> list[masks.Mask]:
        """Return the masks that this client adds: its own, and one for each peer.

        Raises:
            FederationError: if a peer's key is unusable.
        """
        found = [masks.own_mask(self._seed, self._context, self.name)]
        for peer in peers:
            secret = self._agree(self._mask_key, peer, self._peers[peer].mask_key)
            found.append(masks.pair_mask(secret, self._context, self.name, peer))
        return found

    def reveal(self, survivors: Iterable[str], others: Iterable[str]) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """Return the shares of the survivors' seeds and of the others' mask keys, and forget all shares."""
        found = {name: self._seed_shares[name] for name in survivors}, {name: self._key_shares[name] for name in others}
        self._seed_shares, self._key_shares = {}, {}
        return found

    def _agree(self, own: X25519PrivateKey, peer: str, key: bytes) -> bytes:
        try:
            return masks.agreed(own, key)
        except ValueError as error:
            raise FederationError(f"{peer} sent a key that makes secrets predictable; exclude that site") from error


def commitment(seed: bytes) -> bytes:
    """Return the commitment to a seed. A seed is random, so that its digest does not give it away."""
    return hashlib.sha256(b"fedmllm secure aggregation seed" + seed).digest()
