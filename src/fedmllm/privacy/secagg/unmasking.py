"""What the server computes from revealed shares: the masks that are left in the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg import masks, shamir
from fedmllm.privacy.secagg.messages import PublicKeys
from fedmllm.privacy.secagg.own_secrets import commitment

Shares = Mapping[int, bytes]
"""Shares of one secret by point."""


def seed_mask(client: str, context: bytes, committed: bytes, shares: Shares) -> masks.Mask:
    """Return the mask of a survivor's own seed.

    Args:
        client: the survivor.
        context: the session's context.
        committed: its commitment to the seed.
        shares: t shares of the seed.

    Raises:
        FederationError: if the shares do not give that seed back.
    """
    seed = _combined(client, "seed", shares, lambda secret: commitment(secret) == committed)
    return masks.own_mask(seed, context, client)


def pair_masks(client: str, context: bytes, peers: Mapping[str, PublicKeys], shares: Shares) -> list[masks.Mask]:
    """Return the masks that survivors added because of a client that is not in the sum.

    Args:
        client: the client.
        context: the session's context.
        peers: its own keys and those of the survivors.
        shares: t shares of its mask key.

    Raises:
        FederationError: if the shares do not give the mask key back.
    """
    secret = _combined(client, "mask key", shares, lambda found: _public(found) == peers[client].mask_key)
    key = X25519PrivateKey.from_private_bytes(secret)
    return [masks.pair_mask(masks.agreed(key, peers[name].mask_key), context, name, client) for name in sorted(peers.keys() - {client})]


def _combined(client: str, what: str, shares: Shares, right: Callable[[bytes], bool]) -> bytes:
    try:
        secret = shamir.combine(shares)
    except ValueError:
        secret = b""
    if not secret or not right(secret):
        raise FederationError(
            f"shares do not give the {what} of {client} back, so {client} or a client that revealed one sent wrong shares; this round is skipped"
        )
    return secret


def _public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()
