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
def test_compress_equals_the_truncated_svd(outputs: int, inputs: int, held: int, rank: int, seed: int) -> None:
    whole = pair(outputs, inputs, held, seed)
    u, s, vt = np.linalg.svd(whole.product().numpy(), full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    compressed = factors.compress(whole, rank)
    assert compressed.a.shape == (rank, inputs)
    assert compressed.b.shape == (outputs, rank)
    np.testing.assert_allclose(compressed.product().numpy(), best, atol=1e-8)


def test_leading_columns_of_a_compression_are_the_best_of_their_rank() -> None:
    whole = pair(8, 9, 7)
    cut = factors.cut(factors.named({"m": factors.compress(whole, 5)}), 2)
    expected = factors.compress(whole, 2).product()
    torch.testing.assert_close(factors.products(cut)["m"], expected, atol=1e-9, rtol=0)


def test_compress_of_zero_is_zero() -> None:
    compressed = factors.compress(Pair(torch.randn(3, 5), torch.zeros(4, 3)), 2)
    assert float(compressed.product().abs().max()) == 0
    assert bool(torch.isfinite(compressed.a).all())


def test_stack_equals_the_weighted_sum_of_products_of_any_ranks() -> None:
    members, shares = [weights(2, 1), weights(4, 2), weights(1, 3)], [0.5, 0.3, 0.2]
    stacked = factors.stack(members, shares)
    for module in ("x.q", "x.v"):
        expected = sum((p * factors.products(m)[module] for p, m in zip(shares, members, strict=True)), torch.zeros(()))
        torch.testing.assert_close(stacked[module].product(), expected, atol=1e-6, rtol=0)
        assert len(stacked[module].a) == 7


@given(st.integers(1, 4))
def test_padding_restores_a_cut_factor_with_zeros(rank: int) -> None:
    whole = weights(4)
    back = factors.padded(factors.cut(whole, rank), whole)
    for name, tensor in whole.items():
        kept = (slice(None, rank),) if factors.is_a(name) else (slice(None), slice(None, rank))
        assert torch.equal(back[name][kept], tensor[kept])
        assert int(back[name].count_nonzero()) == tensor[kept].numel()


def test_pairs_and_named_are_inverse() -> None:
    whole = weights(3)
    assert dict(factors.pairs(whole)).keys() == {"x.q", "x.v"}
    again = factors.named(dict(factors.pairs(whole)))
    assert all(again[name] is tensor for name, tensor in whole.items())


def test_the_norm_of_products_equals_that_of_the_full_product() -> None:
    whole = weights(3)
    expected = np.sqrt(sum(float(p.square().sum()) for p in factors.products(whole).values()))
    assert factors.product_norm(whole) == pytest.approx(expected, rel=1e-6)


def first_order(lost: Weights, at: Weights) -> Weights:
    """The change of the products by a residual: ``e_B A + B e_A``."""
    was = dict(factors.pairs(at))
    return {m: e.b.double() @ was[m].a.double() + was[m].b.double() @ e.a.double() for m, e in factors.pairs(lost)}


def test_a_residual_survives_a_new_split_of_the_same_product() -> None:
    """For A <- R A and B <- B R^-1 the carried residual changes the product equally. The same numbers beside the new factors do not."""
    old, lost = weights(3), {**weights(3, 5), "connector.weight": torch.ones(2)}
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(8)))[0]
    new = factors.named({m: Pair(rotation @ p.a, p.b @ rotation.T) for m, p in factors.pairs(old)})
    moved, before = factors.carried(lost, old, new), first_order(lost, old)
    for module, product in first_order(moved, new).items():
        torch.testing.assert_close(product, before[module], atol=1e-5, rtol=0)
    assert float((first_order(lost, new)["x.q"] - before["x.q"]).norm() / before["x.q"].norm()) > 0.5
    assert torch.equal(moved["connector.weight"], torch.ones(2))
    assert all(tensor.dtype == torch.float32 and tensor.shape == lost[name].shape for name, tensor in moved.items())


def test_a_residual_is_carried_over_by_least_squares() -> None:
    """Each of its two terms, computed by NumPy: e_B A_old ~ X A_new and B_old e_A ~ B_new Y."""
    old, new, lost = weights(3), weights(3, 20), weights(3, 40)
    moved = dict(factors.pairs(factors.carried(lost, old, new)))
    for module, now in factors.pairs(new):
        was, e = dict(factors.pairs(old))[module], dict(factors.pairs(lost))[module]
        x = np.linalg.lstsq(now.a.double().numpy().T, (e.b.double() @ was.a.double()).numpy().T, rcond=0.1)[0].T
        y = np.linalg.lstsq(now.b.double().numpy(), (was.b.double() @ e.a.double()).numpy(), rcond=0.1)[0]
        np.testing.assert_allclose(moved[module].b.numpy(), x, atol=1e-5)
        np.testing.assert_allclose(moved[module].a.numpy(), y, atol=1e-5)


def test_a_tiny_direction_does_not_enlarge_a_residual() -> None:
    old, lost = weights(3), weights(3, 5)
    new = factors.named({m: Pair(p.a, p.b * torch.tensor([1.0, 1.0, 1e-9])) for m, p in factors.pairs(old)})
    assert max(float(tensor.abs().max()) for tensor in factors.carried(lost, old, new).values()) < 100
    nothing = {name: torch.zeros_like(tensor) for name, tensor in old.items()}
    assert not any(tensor.any() for tensor in factors.carried(lost, old, nothing).values())
