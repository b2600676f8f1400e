"""Clients' tensors as integers: what they mean, and that clients with other settings do not agree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.errors import ConfigError, FederationError
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.secagg.encoding import Encoding, shares
from fedmllm.privacy.secagg.layout import Layout
from fedmllm.privacy.secagg.messages import Vector
from fedmllm.privacy.secagg.quantize import Private, Weighted

Tensors = dict[str, dict[str, torch.Tensor]]


def contribution(seed: int, size: float = 0.5) -> Tensors:
    numbers = torch.Generator().manual_seed(seed)
    draw = lambda *shape: size * (2 * torch.rand(shape, generator=numbers) - 1)  # noqa: E731
    return {"update": {"b": draw(2, 3), "a": draw(4)}, "control": {"b": draw(2, 3), "a": draw(4)}}


def summed(vectors: list[Vector]) -> Vector:
    total: Vector = np.add.reduce(vectors, dtype=np.uint32)
    return total


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=6), st.data())
def test_the_mean_of_survivors_is_within_the_rounding_of_their_number(counts: list[int], data: st.DataObject) -> None:
    names = [f"c{k}" for k in range(len(counts))]
    weights = shares({name: float(count) for name, count in zip(names, counts, strict=True)})
    left = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    given_, encoding = {name: contribution(k) for k, name in enumerate(names)}, Encoding(Weighted(1.0))
    total = summed([encoding.vector(given_[name], name, weights, ("control",)) for name in left])
    means = encoding.means(Layout.of(given_["c0"]), total, left, weights, ("control",))
    share = sum(weights[name] for name in left)
    for kind, tensor in itertools.product(("update", "control"), ("a", "b")):
        each = [weights[name] / share if kind == "update" else 1 / len(left) for name in left]
        exact = sum(w * given_[name][kind][tensor].double() for w, name in zip(each, left, strict=True))
        divisor = share if kind == "update" else len(left) / len(names)
        assert (means[kind][tensor] - exact).abs().max() <= len(left) * 0.5 * 2**-30 / divisor * (1 + 1e-6)


def test_clipped_sums_have_no_weights() -> None:
    encoding, names = Encoding(Private(1.0, 1.0, 3, 2)), ["a", "b", "c"]
    given_ = {name: contribution(k, 0.01) for k, name in enumerate(names)}
    total = summed([encoding.vector(given_[name], name, {"a": 0.9, "b": 0.05, "c": 0.05}) for name in names])
    found = encoding.sums(Layout.of(given_["a"]), total)
    exact = sum(given_[name]["update"]["a"].double() for name in names)
    torch.testing.assert_close(found["update"]["a"], exact, atol=1e-7, rtol=0)


def test_noise_comes_from_the_source() -> None:
    slots = contribution(0)
    first, second, third = (
        Encoding(Private(1.0, 1.0, 3, 2), True, noise).vector(slots, "a", {"a": 1.0}) for noise in (Noise(1), Noise(1), Noise())
    )
    assert (first == second).all()
    assert (first != third).any()


def test_clients_with_other_settings_do_not_agree() -> None:
    layout, other = Layout.of(contribution(0)), Layout.of({"update": contribution(0)["update"]})
    private = [Private(*row) for row in itertools.product((1.0, 2.0), (1.0, 1.5), (5, 6), (3, 4), (0, 1))]
    encodings = [Encoding(Weighted(size)) for size in (1.0, 4.0)] + [Encoding(q, noisy) for q in private for noisy in (False, True)]
    terms = {encoding.terms(place) for encoding in encodings for place in (layout, other)}
    assert len(terms) == 2 * len(encodings)


@pytest.mark.parametrize("value", [1.5, float("nan"), float("-inf")])
def test_a_contribution_that_cannot_be_in_a_sum_is_found_before_the_session(value: float) -> None:
    slots = contribution(0)
    Encoding(Weighted(1.0)).require(slots)
    slots["control"]["a"][2] = value
    with pytest.raises(FederationError, match="entries of an update must be numbers of at most 1"):
        Encoding(Weighted(1.0)).require(slots)


def test_a_private_contribution_that_is_too_long_is_found_before_the_session() -> None:
    noisy = Encoding(Private(1e-3, 3e5, 2, 2), True)
    noisy.require({"update": {"a": torch.zeros(10)}})
    with pytest.raises(ConfigError, match="takes the whole clip_norm"):
        noisy.require({"update": {"a": torch.zeros(10**6)}})


def test_shares_need_a_positive_weight() -> None:
    assert shares({"a": 3.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    with pytest.raises(FederationError, match="no update has a positive weight"):
        shares({"a": 0.0})
