"""Arithmetic on LoRA's two factors: ``dW = (alpha / r) B A`` with A of shape (r, inputs) and B of shape (outputs, r).

All functions leave out the scale ``alpha / r``. They form a full-size product only if they return one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmllm.types import Weights

_A, _B = ".lora_A.weight", ".lora_B.weight"


def is_a(name: str) -> bool:
    """Return whether a tensor is a factor A."""
    return name.endswith(_A)


def is_b(name: str) -> bool:
    """Return whether a tensor is a factor B."""
    return name.endswith(_B)


def others(weights: Mapping[str, Tensor]) -> Weights:
    """Return the tensors that are not LoRA factors, such as those of fully trained layers."""
    return {name: tensor for name, tensor in weights.items() if not (is_a(name) or is_b(name))}


@dataclass(frozen=True)
class Pair:
    """One module's factors: ``a`` of shape (rank, inputs), ``b`` of shape (outputs, rank)."""

    a: Tensor
    b: Tensor

    def product(self) -> Tensor:
        """Return ``B A`` in float64, shape (outputs, inputs)."""
        return self.b.double() @ self.a.double()


def pairs(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Pair]]:
    """Yield each module's name and its factors, in the order of the tensors."""
    for name, a in weights.items():
        if is_a(name):
            module = name.removesuffix(_A)
            yield module, Pair(a, weights[module + _B])


def named(modules: Mapping[str, Pair]) -> Weights:
    """Return the factors as named tensors; the inverse of ``pairs``."""
    return {name: tensor for module, pair in modules.items() for name, tensor in ((module + _A, pair.a), (module + _B, pair.b))}


def products(weights: Mapping[str, Tensor]) -> Weights:
    """Return ``B A`` by module, in float64."""
    return {module: pair.product() for module, pair in pairs(weights)}


def accumulated(gained: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> Weights:
    """Add products of factors to full-size matrices, by module, in float64, and round once to float32.

    Args:
        gained: the matrices so far, each of shape (outputs, inputs); empty to start from zero.
        step: the factors.
    """
    return {module: (gained[module].double() + term if gained else term).float() for module, term in products(step).items()}


def product_norm(weights: Mapping[str, Tensor]) -> float:
    """Return the Frobenius norm over all modules' products, from the factors' Gram matrices: ``||B A||^2 = <B'B, A A'>``."""
    squares = [((p.b.double().T @ p.b.double()) * (p.a.double() @ p.a.double().T)).sum() for _, p in pairs(weights)]
    return float(torch.stack(squares).sum().clamp(min=0).sqrt())


def cut(weights: Mapping[str, Tensor], rank: int | None) -> Weights:
    """Return the first ``rank`` rows of every A and columns of every B, or all of them if ``rank`` is None."""
    if rank is None:
        return dict(weights)
    return {n: t[:rank].contiguous() if is_a(n) else t[:, :rank].contiguous() if is_b(n) else t for n, t in weights.items()}


def beyond(weights: Mapping[str, Tensor], rank: int) -> Weights:
    """Return the rows of every A and columns of every B that ``cut`` drops. Other tensors are left out."""
    return {n: t[rank:] if is_a(n) else t[:, rank:] for n, t in weights.items() if is_a(n) or is_b(n)}


def rank(weights: Mapping[str, Tensor]) -> int:
    """Return the largest rank of any module."""
    return max(len(pair.a) for _, pair in pairs(weights))


def padded(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Weights:
    """Append zero rows to A and zero columns to B, up to the shapes of ``like``; undoes ``cut``."""
    return {name: tensor if tensor.shape == like[name].shape else _grown(tensor, like[name].shape) for name, tensor in weights.items()}


def _grown(tensor: Tensor, shape: torch.Size) -> Tensor:
    grown = tensor.new_zeros(shape)
    grown[: tensor.shape[0], : tensor.shape[1]] = tensor
    return grown


def stack(members: Sequence[Weights], shares: Sequence[float]) -> dict[str, Pair]:
    """Return factors of ``sum_k share_k B_k A_k``, by module: ``[B_1 | B_2 | ...]`` and ``[share_1 A_1; share_2 A_2; ...]``, in float64."""
    return {
        module: Pair(
            torch.cat([share * m[module + _A].double() for share, m in zip(shares, members, strict=True)]),
            torch.cat([m[module + _B].double() for m in members], dim=1),
        )
        for module, _ in pairs(members[0])
    }


def compress(pair: Pair, rank: int) -> Pair:
    """Return the best approximation of ``B A`` at a given rank, in the Frobenius norm: ``B = U_r S_r``, ``A = V_r'``.

    It computes QR decompositions of both factors and the SVD of the small product of their triangles, and forms nothing of shape
    (outputs, inputs). Rows of A have length 1 even if their singular value is zero, so that a gradient reaches the matching column of B.
    There are at most min(pair's rank, inputs, outputs) such rows; any further rank index is zero in both factors, and no gradient moves it.
    Signs are fixed (the largest entry of every row of A is positive), so that equal inputs give equal factors.
    """
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    b, a = q_b @ (u[:, :rank] * s[:rank]), vt[:rank] @ q_a.T
    sign = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    return Pair(_grown(a * sign, torch.Size((rank, a.shape[1]))), _grown(b * sign.T, torch.Size((b.shape[0], rank))))


_WEAK = 0.1
"""When a residual is carried over, singular values below this share of the largest count as 0. Dividing by one would let the residual
dominate the update."""


def carried(lost: Weights, old: Weights, new: Weights) -> Weights:
    """Translate residuals of old factors to new factors with other directions.

        e_B <- e_B A_old A_new^+,   e_A <- B_new^+ B_old e_A

    To first order, a residual changes the product by ``e_B A + B e_A``. The translation preserves each term as closely as the new factors
    allow. Tensors that are not LoRA factors are not changed.

    Args:
        lost: the residuals by tensor.
        old: the finite factors that the residuals belong to.
        new: the finite factors to translate to, with the same shapes.
    """
    before = dict(pairs(old))
    moved = {}
    for module, now in pairs(new):
        e, was = Pair(lost[module + _A], lost[module + _B]), before[module]
        turned_b = was.a.double() @ torch.linalg.pinv(now.a.double(), rtol=_WEAK)
        turned_a = torch.linalg.pinv(now.b.double(), rtol=_WEAK) @ was.b.double()
        moved[module] = Pair(turned_a @ e.a.double(), e.b.double() @ turned_b)
    return {**lost, **to_float(moved.items())}


def to_float(modules: Iterable[tuple[str, Pair]]) -> Weights:
    """Return the factors as named tensors in float32."""
    return named({module: Pair(pair.a.float(), pair.b.float()) for module, pair in modules})
