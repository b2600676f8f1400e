from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm import weights as W
from fedmllm.errors import FederationError


def test_weighted_mean_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    terms, counts = rng.normal(size=(5, 4, 3)), [3, 1, 4, 1, 5]
    mean = W.WeightedMean()
    for term, count in zip(terms, counts, strict=True):
        mean.add({"w": torch.tensor(term)}, count)
    np.testing.assert_allclose(mean.value()["w"].numpy(), np.average(terms, axis=0, weights=counts), rtol=1e-14)


def test_the_mean_does_not_change_its_inputs() -> None:
    term = {"w": torch.ones(2)}
    mean = W.WeightedMean()
    mean.add(term, 2)
    mean.add(term, 3)
    assert torch.equal(term["w"], torch.ones(2))


@pytest.mark.parametrize("weights", [[], [0.0], [0.0, 0.0]])
def test_zero_total_weight_is_an_error_not_nan(weights: list[float]) -> None:
    mean = W.WeightedMean()
    for weight in weights:
        mean.add({"w": torch.ones(1)}, weight)
    with pytest.raises(FederationError, match="positive weight"):
        mean.value()


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(FederationError, match="negative"):
        W.WeightedMean().add({"w": torch.ones(1)}, -1)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8))
def test_adding_a_zero_update_changes_no_bit(values: list[float]) -> None:
    weights = {"w": torch.tensor(values, dtype=torch.float32)}
    assert torch.equal(W.add(weights, W.zeros_like(weights))["w"], weights["w"])


def test_the_norm_covers_all_tensors() -> None:
    assert W.norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}) == pytest.approx(5.0)


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (float("nan"), False), (float("inf"), False), (float("-inf"), False)])
def test_is_finite(value: float, finite: bool) -> None:
    assert W.is_finite({"a": torch.zeros(2), "b": torch.tensor([0.0, value])}) is finite


def test_num_bytes_counts_the_dtype() -> None:
    assert W.num_bytes({"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.bfloat16)}) == 16
