"""Masks and sealed shares: X25519 agrees secrets, HKDF derives keys, AES-256-CTR expands masks, ChaCha20-Poly1305 seals."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmllm.privacy.secagg.messages import Vector
from fedmllm.privacy.secagg.statements import statement

_CHUNK = 1 << 16
"""Entries that are masked at a time. 256 KiB of each mask stay in the processor's cache."""
_NONCE = bytes(12)
"""Every key seals one message only, so that its nonce may be constant."""


class Mask(NamedTuple):
    """A pseudorandom vector: the key stream of AES-256 in counter mode, as little-endian integers.

    Attributes:
        key: the cipher's key, 32 bytes.
        positive: whether it is added; otherwise it is subtracted.
    """

    key: bytes
    positive: bool

    def inverse(self) -> Mask:
        """Return the mask that cancels this one."""
        return Mask(self.key, not self.positive)


def agreed(own: X25519PrivateKey, peer: bytes) -> bytes:
    """Return the secret of two key pairs.

    Raises:
        ValueError: if the peer's key is one of the few that make the secret predictable.
    """
    return own.exchange(X25519PublicKey.from_public_bytes(peer))


def is_usable(key: bytes) -> bool:
    """Return whether a public key is none of those that make secrets predictable."""
    try:
        agreed(X25519PrivateKey.generate(), key)
    except ValueError:
        return False
    return True


def pair_mask(secret: bytes, context: bytes, client: str, peer: str) -> Mask:
    """Return the mask that a client adds because of a peer. The peer's is its inverse."""
    low, high = sorted((client, peer))
    return Mask(_derived(secret, statement("pair mask", context, low, high)), client == low)


def own_mask(seed: bytes, context: bytes, client: str) -> Mask:
    """Return the mask of a client's own seed."""
    return Mask(_derived(seed, statement("own mask", context, client)), True)


def seal(secret: bytes, context: bytes, sender: str, receiver: str, content: bytes) -> bytes:
    """Encrypt and authenticate content from a sender to a receiver in a session. A session seals once in each direction."""
    about = statement("sealed", context, sender, receiver)
    return ChaCha20Poly1305(_derived(secret, about)).encrypt(_NONCE, content, about)


def unseal(secret: bytes, context: bytes, sender: str, receiver: str, sealed: bytes) -> bytes:
    """Decrypt what ``seal`` returned.

    Raises:
        ValueError: if it was sealed by or for another client, in another session, or was changed.
    """
    about = statement("sealed", context, sender, receiver)
    try:
        return ChaCha20Poly1305(_derived(secret, about)).decrypt(_NONCE, sealed, about)
    except InvalidTag as error:
        raise ValueError("it was changed, or sealed for another client or session") from error


def add_masks(vector: Vector, masks: Sequence[Mask]) -> None:
    """Add masks to a vector in place, with as many threads as PyTorch uses.

    Masks are expanded chunk by chunk and never held as a whole.
    """
    threads = max(min(torch.get_num_threads(), len(vector) // _CHUNK), 1)
    size = -(-len(vector) // (threads * _CHUNK)) * _CHUNK
    starts = range(0, len(vector), max(size, 1))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda start: _add(vector[start : start + size], masks, start), starts))


def _add(part: Vector, masks: Sequence[Mask], start: int) -> None:
    """Add the entries of masks from ``start`` on, a multiple of the chunk size."""
    streams = [(_stream(mask.key, start), np.add if mask.positive else np.subtract) for mask in masks]
    zeros, buffer = memoryview(bytes(4 * _CHUNK)), np.empty(_CHUNK, "<u4")
    for begin in range(0, len(part), _CHUNK):
        chunk = part[begin : begin + _CHUNK]
        space = buffer[: len(chunk)]
        for stream, operation in streams:
            stream.update_into(zeros[: space.nbytes], space.view(np.uint8).data)
            operation(chunk, space, out=chunk)


def _stream(key: bytes, start: int) -> CipherContext:
    """Return the key stream from an entry on. A block of the cipher has four entries."""
    return Cipher(algorithms.AES(key), modes.CTR((start // 4).to_bytes(16, "big"))).encryptor()


def _derived(secret: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), length=32, salt=None, info=info).derive(secret)
