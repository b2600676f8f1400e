from __future__ import annotations

import hashlib
import hmac

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from fedmllm.privacy.secagg import masks
from fedmllm.privacy.secagg.masks import Mask
from fedmllm.privacy.secagg.policy import threshold
from fedmllm.privacy.secagg.statements import digest, statement
from secure_sessions import Session

CHUNK = 1 << 16


def stream(key: bytes, length: int) -> np.ndarray:
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * length)), "<u4")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 5, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 3])
def test_masks_are_the_key_stream_whatever_the_chunks_and_threads(length: int, threads: int) -> None:
    rng = np.random.default_rng(length)
    given_ = rng.integers(0, 2**32, length, dtype=np.uint32)
    keys = [rng.bytes(32) for _ in range(3)]
    found = given_.copy()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        masks.add_masks(found, [Mask(keys[0], True), Mask(keys[1], False), Mask(keys[2], True)])
    finally:
        torch.set_num_threads(before)
    assert (found == given_ + stream(keys[0], length) - stream(keys[1], length) + stream(keys[2], length)).all()


def test_both_clients_of_a_pair_derive_opposite_masks() -> None:
    a, b = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    secrets = masks.agreed(a, b.public_key().public_bytes_raw()), masks.agreed(b, a.public_key().public_bytes_raw())
    first, second = (masks.pair_mask(secret, b"c", *names) for secret, names in zip(secrets, ("ab", "ba"), strict=True))
    assert second == first.inverse() != first
    vector = np.arange(9, dtype=np.uint32)
    masks.add_masks(vector, [first, second])
    assert (vector == np.arange(9)).all()


def test_keys_are_derived_for_their_purpose_clients_and_session() -> None:
    secret = bytes(range(32))
    found = [
        masks.pair_mask(secret, b"c", "a", "b").key,
        masks.pair_mask(secret, b"d", "a", "b").key,
        masks.pair_mask(secret, b"c", "a", "bb").key,
        masks.own_mask(secret, b"c", "a").key,
        masks.own_mask(secret, b"d", "a").key,
        masks.own_mask(secret, b"c", "b").key,
    ]
    assert len(set(found)) == 6
    # HKDF (RFC 5869) with SHA-256 and no salt, for one block
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    assert found[3] == hmac.new(extracted, statement("own mask", b"c", "a") + b"\x01", hashlib.sha256).digest()


def test_shares_are_opened_by_their_receiver_in_their_session_only() -> None:
    secret, content = bytes(32), bytes(range(132))
    sealed = masks.seal(secret, b"session", "a", "b", content)
    assert len(sealed) == 148
    assert masks.unseal(secret, b"session", "a", "b", sealed) == content
    wrong = [
        (secret, b"another", "a", "b", sealed),
        (secret, b"session", "b", "a", sealed),
        (secret, b"session", "c", "b", sealed),
        (secret, b"session", "a", "c", sealed),
        (bytes(31) + b"\x01", b"session", "a", "b", sealed),
        (secret, b"session", "a", "b", bytes([sealed[0] ^ 1]) + sealed[1:]),
        (secret, b"session", "a", "b", sealed[:-1]),
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="it was changed, or sealed for another client or session"):
            masks.unseal(*arguments)


def test_keys_of_small_order_are_unusable() -> None:
    assert not masks.is_usable(bytes(32))
    assert not masks.is_usable(b"\x01" + bytes(31))
    assert masks.is_usable(X25519PrivateKey.generate().public_key().public_bytes_raw())


values = st.one_of(st.text(max_size=3), st.integers(-9, 9), st.binary(max_size=3), st.floats(-2, 2).filter(bool))


@given(st.lists(values, max_size=4), st.lists(values, max_size=4))
def test_different_values_never_give_the_same_statement(first: list, second: list) -> None:
    same = [(type(value), value) for value in first] == [(type(value), value) for value in second]
    assert (statement("kind", *first) == statement("kind", *second)) == same
    assert statement("other", *first) != statement("kind", *first)
    assert len(digest("kind", *first)) == 32


@pytest.mark.parametrize(("count", "expected"), [(2, 2), (3, 3), (4, 3), (5, 4), (6, 5), (7, 5), (10, 7), (50, 34)])
def test_the_threshold_is_more_than_two_thirds(count: int, expected: int) -> None:
    assert threshold(count) == expected


def test_masked_vectors_are_uniform_whatever_the_input() -> None:
    """Bytes of vectors of zeros. A test of uniform bytes would fail once in a million runs."""
    session = Session(3)
    zeros = np.zeros(100_000, np.uint32)
    session.vectors = dict.fromkeys(session.vectors, zeros)
    found = {name: session.answer(name, "masked", message).vector for name, message in session.down("masked").items()}
    for vector in (*found.values(), found["a"] + found["b"], found["a"] - found["b"]):
        assert chisquare(np.bincount(vector.view(np.uint8), minlength=256)).pvalue > 1e-6
    assert not (found["a"] + found["b"] + found["c"] == 0).all()


def test_masks_do_not_depend_on_the_input() -> None:
    """With the same masks, masked vectors of x and y differ by x - y. Uniform masks therefore hide the input completely."""
    given_ = np.arange(5, dtype=np.uint32), np.full(5, 7, np.uint32)
    found = [vector.copy() for vector in given_]
    for vector in found:
        masks.add_masks(vector, [Mask(bytes(32), True)])
    assert (found[0] - found[1] == given_[0] - given_[1]).all()
