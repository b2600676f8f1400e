from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.errors import ConfigError
from fedmllm.privacy.accounting import Releases, epsilon
from fedmllm.privacy.clipping import AdaptiveClip, bit_deviation, clipped, joint_norm, update_multiplier


def slots(seed: int, size: float) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "update": {"a": size * torch.randn(40, 3, generator=generator), "b": size * torch.randn(7, generator=generator)},
        "extra": {"a": size * torch.randn(40, 3, generator=generator)},
    }


@given(st.integers(0, 2**32), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_no_norm_over_all_tensors_exceeds_the_bound(seed: int, size: float, clip_norm: float) -> None:
    given_, found = slots(seed, size), clipped(slots(seed, size), clip_norm)
    before = joint_norm(given_)
    assert joint_norm(found) <= clip_norm
    assert joint_norm(found) == pytest.approx(min(before, clip_norm), rel=1e-9)
    for kind, tensors in given_.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[kind][name], tensor.double() * min(1, clip_norm / before), rtol=1e-9, atol=0)


def test_small_updates_are_not_scaled() -> None:
    given_ = slots(0, 1e-3)
    assert all(torch.equal(clipped(given_, 1.0)[kind][name], t.double()) for kind, ts in given_.items() for name, t in ts.items())


def test_clipping_by_tensor_would_break_the_bound() -> None:
    found = {kind: clipped({kind: tensors}, 1.0)[kind] for kind, tensors in slots(0, 10).items()}
    assert joint_norm(found) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(("deviation", "expected"), [(5.0, 1.0050378), (1.0, 1.1547005)])
def test_the_bits_cost_is_taken_from_the_updates(deviation: float, expected: float) -> None:
    found = update_multiplier(1.0, deviation)
    assert found == pytest.approx(expected, abs=1e-7)
    both = [Releases(found), Releases(2 * deviation)]  # a bit changes the sum by 1/2
    assert epsilon(both, 1e-5) == pytest.approx(epsilon([Releases(1.0)], 1e-5), rel=1e-9)


def test_the_noise_on_the_bits_has_the_published_size() -> None:
    assert (bit_deviation(1.0, 100), bit_deviation(1.0, 10)) == (5.0, 1.0)
    with pytest.raises(ConfigError, match=r"must be greater than 0\.5, got 0\.5"):
        update_multiplier(1.0, 0.5)


def test_the_clip_norm_settles_at_the_quantile() -> None:
    rng, rule, clip_norm = np.random.default_rng(0), AdaptiveClip(quantile=0.8), 0.01
    for _ in range(300):
        norms = rng.lognormal(0.0, 0.5, 100)
        clip_norm = rule.next(clip_norm, sum(rule.bit(norm, clip_norm) for norm in norms) + rng.normal(0, 5), 100)
    assert clip_norm == pytest.approx(math.exp(0.5 * 0.8416), rel=0.1)


def test_a_share_at_the_quantile_keeps_the_clip_norm() -> None:
    assert AdaptiveClip(0.5).next(2.0, 0.0, 10) == 2.0
    assert AdaptiveClip(0.5, 0.2).next(2.0, 5.0, 10) == pytest.approx(2 * math.exp(-0.1))


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"quantile must be in \(0, 1\)"):
        AdaptiveClip(1.0)
    with pytest.raises(ConfigError, match="learning_rate must be greater than 0"):
        AdaptiveClip(0.5, 0.0)
