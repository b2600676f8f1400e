from __future__ import annotations

import pytest

from fedmllm.errors import ConfigError, FederationError
from fedmllm.privacy.secagg.policy import Policy


def test_limits_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="min_clients must be at least 2, because a sum of one client hides nothing, got 1"):
        Policy(1)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"largest_share must be in \(0, 1\)"):
            Policy(2, share)


def test_the_larger_of_both_numbers_is_needed() -> None:
    Policy(3).require_enough(3, 3, "came")
    for policy, t in ((Policy(4), 3), (Policy(3), 4)):
        with pytest.raises(FederationError, match=r"a session needs at least 4 clients .*, but 3 came"):
            policy.require_enough(3, t, "came")


def test_shares_are_relative_to_the_clients_in_the_sum() -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.1}
    Policy(2, 0.5).require_balanced(weights, "abcd")
    with pytest.raises(FederationError, match=r"at most 0\.5 of a sum's weight, but a has 0\.625"):
        Policy(2, 0.5).require_balanced(weights, "ab")
    Policy(2, 0.5).require_balanced(weights, "cd")
    with pytest.raises(FederationError, match="but c has nan"):
        Policy(2).require_balanced({"c": 0.0, "d": 0.0}, "cd")


def test_rounded_weights_may_sum_to_slightly_more_than_one() -> None:
    Policy(2).require_balanced(dict.fromkeys("abcdefghij", 0.1), "abcdefghij")
    Policy(2).require_balanced({"a": 0.5, "b": 0.5 + 1e-12}, "ab")
    with pytest.raises(FederationError, match=r"weights in a sum must sum to at most 1, got 1\.1"):
        Policy(2).require_balanced({"a": 0.5, "b": 0.6}, "ab")
