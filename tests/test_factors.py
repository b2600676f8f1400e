from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm import factors
from fedmllm.factors import Pair
from fedmllm.types import Weights


def pair(outputs: int, inputs: int, rank: int, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))


def weights(rank: int, seed: int = 0) -> Weights:
    return factors.named({"x.q": pair(7, 5, rank, seed), "x.v": pair(4, 6, rank, seed + 1)})


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))
def test_compress_is_the_truncated_svd(outputs: int, inputs: int, held: int, rank: int, seed: int) -> None:
    whole = pair(outputs, inputs, held, seed)
    u, s, vt = np.linalg.svd(whole.product().numpy(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    compressed = factors.compress(whole, rank)
    assert compressed.a.shape == (rank, inputs)
    assert compressed.b.shape == (outputs, rank)
    np.testing.assert_allclose(compressed.product().numpy(), best, atol=1e-8)


def test_the_first_columns_of_a_compression_are_the_best_of_that_rank() -> None:
    whole = pair(8, 9, 7)
    cut = factors.cut(factors.named({"m": factors.compress(whole, 5)}), 2)
    expected = factors.compress(whole, 2).product()
    torch.testing.assert_close(factors.products(cut)["m"], expected, atol=1e-9, rtol=0)


def test_compress_of_nothing_is_nothing() -> None:
    compressed = factors.compress(Pair(torch.randn(3, 5), torch.zeros(4, 3)), 2)
    assert float(compressed.product().abs().max()) == 0
    assert bool(torch.isfinite(compressed.a).all())


def test_stack_is_the_weighted_sum_of_products_of_any_ranks() -> None:
    members, shares = [weights(2, 1), weights(4, 2), weights(1, 3)], [0.5, 0.3, 0.2]
    stacked = factors.stack(members, shares)
    for module in ("x.q", "x.v"):
        expected = sum((p * factors.products(m)[module] for p, m in zip(shares, members, strict=True)), torch.zeros(()))
        torch.testing.assert_close(stacked[module].product(), expected, atol=1e-6, rtol=0)
        assert len(stacked[module].a) == 7


@given(st.integers(1, 4))
def test_padding_undoes_cutting_up_to_zeros(rank: int) -> None:
    whole = weights(4)
    back = factors.padded(factors.cut(whole, rank), whole)
    for name, tensor in whole.items():
        kept = (slice(None, rank),) if factors.is_a(name) else (slice(None), slice(None, rank))
        assert torch.equal(back[name][kept], tensor[kept])
        assert int(back[name].count_nonzero()) == tensor[kept].numel()


def test_pairs_and_names_are_inverse() -> None:
    whole = weights(3)
    assert dict(factors.pairs(whole)).keys() == {"x.q", "x.v"}
    again = factors.named(dict(factors.pairs(whole)))
    assert all(again[name] is tensor for name, tensor in whole.items())


def test_the_norm_of_products_needs_no_product() -> None:
    whole = weights(3)
    expected = np.sqrt(sum(float(p.square().sum()) for p in factors.products(whole).values()))
    assert factors.product_norm(whole) == pytest.approx(expected, rel=1e-6)
