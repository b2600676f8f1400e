from __future__ import annotations

import math
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.errors import ConfigError
from fedmllm.privacy.secagg.shamir import combine, split

PRIME = 2**521 - 1
sizes = st.integers(1, 20).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n)))


@given(st.binary(min_size=32, max_size=32), sizes, st.randoms())
def test_any_t_shares_give_the_secret_back(secret: bytes, size: tuple[int, int], draw: object) -> None:
    t, n = size
    shares = dict(enumerate(split(secret, t, n), 1))
    chosen = draw.sample(sorted(shares), t)  # type: ignore[attr-defined]
    assert combine({point: shares[point] for point in chosen}) == secret


@given(st.binary(min_size=32, max_size=32), st.integers(1, 15))
def test_shares_are_values_of_a_polynomial_of_degree_t_minus_1(secret: bytes, t: int) -> None:
    """The t-th difference of such a polynomial is 0: f(0) = sum over i from 1 to t of (-1)^(i + 1) binomial(t, i) f(i)."""
    values = [int.from_bytes(share, "big") for share in split(secret, t, t)]
    found = sum((-1) ** (i + 1) * math.comb(t, i) * value for i, value in enumerate(values, 1)) % PRIME
    assert found == int.from_bytes(secret, "big")


def test_fewer_shares_fit_every_secret() -> None:
    """For t - 1 shares and any other secret there is exactly one last share; nothing tells the secrets apart."""
    secret, other = secrets.token_bytes(32), secrets.token_bytes(32)
    shares = dict(enumerate(split(secret, 3, 3), 1))
    values = {point: int.from_bytes(share, "big") for point, share in shares.items()}
    # f(0) = 3 f(1) - 3 f(2) + f(3)
    last = (int.from_bytes(other, "big") - 3 * values[1] + 3 * values[2]) % PRIME
    assert combine({1: shares[1], 2: shares[2], 3: last.to_bytes(66, "big")}) == other


def test_a_secret_is_split_differently_each_time() -> None:
    assert not set(split(bytes(32), 2, 5)) & set(split(bytes(32), 2, 5))


def test_shares_that_do_not_belong_together_are_refused() -> None:
    first, second = split(secrets.token_bytes(32), 3, 3), split(secrets.token_bytes(32), 3, 3)
    # A random number of 521 bits has at most 256 with probability 2^-265.
    with pytest.raises(ValueError, match="do not belong to one secret"):
        combine({1: first[0], 2: first[1], 3: second[2]})
    with pytest.raises(ValueError, match="do not belong to one secret"):
        combine({1: first[0], 2: first[1]})
    with pytest.raises(ValueError, match="share 2 is not a number"):
        combine({1: first[0], 2: PRIME.to_bytes(66, "big")})
    with pytest.raises(ValueError, match="share 1 is not a number"):
        combine({1: first[0][1:]})


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="must have 32 bytes, got 31"):
        split(bytes(31), 2, 3)
    for t in (0, 4):
        with pytest.raises(ConfigError, match=f"from 1 to the number of shares, 3, got {t}"):
            split(bytes(32), t, 3)
