"""What clients sign and derive keys for: unambiguous bytes, the same at clients and server."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedmllm.privacy.secagg.messages import PublicKeys, RoundId
from fedmllm.privacy.secagg.policy import threshold

SiteKey = ec.EllipticCurvePrivateKey
"""A site's private key (``site.key``), on the curve P-384."""
SitePublicKey = ec.EllipticCurvePublicKey
"""A site's public key (``NAME.pub``)."""

Value = str | int | float | bytes
"""A part of a statement."""

_DOMAIN = "fedmllm secure aggregation 1"
_HASH = ec.ECDSA(hashes.SHA384())


def statement(kind: str, *values: Value) -> bytes:
    """Return bytes that no other kind or values give. Each value has its type and its length in front."""
    parts = [(type(value).__name__, _encoded(value)) for value in (_DOMAIN, kind, *values)]
    return b"".join(f"{name}:{len(content)}:".encode() + content for name, content in parts)


def _encoded(value: Value) -> bytes:
    if isinstance(value, bytes):
        return value
    return struct.pack(">d", value) if isinstance(value, float) else str(value).encode()


def digest(kind: str, *values: Value) -> bytes:
    """Return the SHA-256 digest of a statement."""
    return hashlib.sha256(statement(kind, *values)).digest()


def signed(key: SiteKey, content: bytes) -> bytes:
    """Return the ECDSA signature of a statement."""
    return key.sign(content, _HASH)


def is_signed(key: SitePublicKey, signature: bytes, content: bytes) -> bool:
    """Return whether a signature of a statement is valid."""
    try:
        key.verify(signature, content, _HASH)
    except InvalidSignature:
        return False
    return True


def keys_statement(round_id: RoundId, session: bytes, terms: bytes, name: str, mask_key: bytes, share_key: bytes) -> bytes:
    """Return what a site's key signs in stage ``keys``."""
    return statement("keys", *_place(round_id, session, terms), name, mask_key, share_key)


def context(round_id: RoundId, session: bytes, terms: bytes, keys: Mapping[str, PublicKeys]) -> bytes:
    """Return a digest of a session and of all public keys in it. Keys are derived for it, and shares sealed for it."""
    rows = [value for name in sorted(keys) for value in (name, keys[name].mask_key, keys[name].share_key)]
    return digest("context", *_place(round_id, session, terms), threshold(len(keys)), *rows)


def survivors_statement(agreed: bytes, weights: Mapping[str, float], length: int, survivors: Iterable[str]) -> bytes:
    """Return what a site's key signs in stage ``survivors``.

    Args:
        agreed: the session's ``context``.
        weights: weights by client, of all clients that are masked with each other.
        length: the length of the vectors.
        survivors: the clients in the sum.
    """
    rows = [value for name in sorted(weights) for value in (name, float(weights[name]))]
    return statement("survivors", agreed, length, len(weights), *rows, *sorted(survivors))


def _place(round_id: RoundId, session: bytes, terms: bytes) -> tuple[Value, ...]:
    return round_id.run, round_id.stage, round_id.round_num, session, terms
