"""Shamir's secret sharing (Communications of the ACM 1979) of 32 bytes over the prime field of 2^521 - 1.

The secret is the value at 0 of a random polynomial of degree t - 1; share i is its value at i. Any t shares determine the polynomial, and
fewer say nothing about the secret.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import lru_cache

from fedmllm.errors import ConfigError

_PRIME = 2**521 - 1
_SECRET, _SHARE = 32, 66
"""Sizes in bytes."""


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Return shares of a secret at the points 1 to ``count``, each of 66 bytes.

    Args:
        secret: 32 bytes.
        threshold: t, the number of shares that give the secret back.
        count: the number of shares, at least t.

    Raises:
        ConfigError: if a value is out of range.
    """
    if len(secret) != _SECRET:
        raise ConfigError(f"a shared secret must have {_SECRET} bytes, got {len(secret)}")
    if not 1 <= threshold <= count:
        raise ConfigError(f"a threshold must be from 1 to the number of shares, {count}, got {threshold}")
    coefficients = [secrets.randbelow(_PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "big"))
    return [_value(coefficients, point).to_bytes(_SHARE, "big") for point in range(1, count + 1)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret.

    Args:
        shares: t shares by point. With fewer, the result is random or an error.

    Raises:
        ValueError: if they are not shares of one secret, as far as that can be seen.
    """
    if wrong := [point for point, share in shares.items() if len(share) != _SHARE or int.from_bytes(share, "big") >= _PRIME]:
        raise ValueError(f"share {wrong[0]} is not a number of the field")
    factors = _at_zero(tuple(sorted(shares)))
    value = sum(factors[point] * int.from_bytes(share, "big") for point, share in shares.items()) % _PRIME
    if value >> 8 * _SECRET:
        raise ValueError("the shares do not belong to one secret")
    return value.to_bytes(_SECRET, "big")


def _value(coefficients: list[int], point: int) -> int:
    value = 0
    for coefficient in coefficients:
        value = (value * point + coefficient) % _PRIME
    return value


@lru_cache(maxsize=16)
def _at_zero(points: tuple[int, ...]) -> dict[int, int]:
    """Return Lagrange's factors at 0. A server combines the shares of many secrets at the same points."""
    found = {}
    for point in points:
        above = below = 1
        for other in points:
            if other != point:
                above, below = above * other % _PRIME, below * (other - point) % _PRIME
        found[point] = above * pow(below, -1, _PRIME) % _PRIME
    return found
