"""Arithmetic on LoRA's two factors: ``dW = (alpha / r) B A`` with A of shape (r, inputs) and B of shape (outputs, r).

Everything here leaves the factor ``alpha / r`` out. Products of full size are formed only where the result is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmllm.types import Weights

_A, _B = ".lora_A.weight", ".lora_B.weight"


def is_a(name: str) -> bool:
    """Whether a tensor is a factor A."""
    return name.endswith(_A)


def is_b(name: str) -> bool:
    """Whether a tensor is a factor B."""
    return name.endswith(_B)


def others(weights: Mapping[str, Tensor]) -> Weights:
    """The tensors that are no factors: of layers that train whole, and what else an adapter has."""
    return {name: tensor for name, tensor in weights.items() if not (is_a(name) or is_b(name))}


@dataclass(frozen=True)
class Pair:
    """One module's factors: ``a`` of shape (rank, inputs), ``b`` of shape (outputs, rank)."""

    a: Tensor
    b: Tensor

    def product(self) -> Tensor:
        """``B A`` in float64, shape (outputs, inputs)."""
        return self.b.double() @ self.a.double()


def pairs(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Pair]]:
    """Factors by module, in the order of the tensors."""
    for name, a in weights.items():
        if is_a(name):
            module = name.removesuffix(_A)
            yield module, Pair(a, weights[module + _B])


def named(modules: Mapping[str, Pair]) -> Weights:
    """The opposite of ``pairs``."""
    return {name: tensor for module, pair in modules.items() for name, tensor in ((module + _A, pair.a), (module + _B, pair.b))}


def products(weights: Mapping[str, Tensor]) -> Weights:
    """``B A`` by module, float64."""
    return {module: pair.product() for module, pair in pairs(weights)}


def accumulated(gained: Mapping[str, Tensor], step: Mapping[str, Tensor]) -> Weights:
    """Matrices of full size, by module, and the products of factors added to them in float64, rounded once to float32; from zero if there are none."""
    return {module: (gained[module].double() + term if gained else term).float() for module, term in products(step).items()}


def product_norm(weights: Mapping[str, Tensor]) -> float:
    """Frobenius norm of all products together, from the factors' Gram matrices: ``||B A||^2 = <B'B, A A'>``."""
    squares = [((p.b.double().T @ p.b.double()) * (p.a.double() @ p.a.double().T)).sum() for _, p in pairs(weights)]
    return float(torch.stack(squares).sum().clamp(min=0).sqrt())


def cut(weights: Mapping[str, Tensor], rank: int | None) -> Weights:
    """The first ``rank`` rows of every A and columns of every B; all of them for None."""
    if rank is None:
        return dict(weights)
    return {n: t[:rank].contiguous() if is_a(n) else t[:, :rank].contiguous() if is_b(n) else t for n, t in weights.items()}


def beyond(weights: Mapping[str, Tensor], rank: int) -> Weights:
    """The rows of every A and columns of every B that ``cut`` leaves out; nothing of other tensors."""
    return {n: t[rank:] if is_a(n) else t[:, rank:] for n, t in weights.items() if is_a(n) or is_b(n)}


def rank(weights: Mapping[str, Tensor]) -> int:
    """The largest rank of any module."""
    return max(len(pair.a) for _, pair in pairs(weights))


def padded(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Weights:
    """Zeros behind the rows of A and columns of B, up to the shapes of ``like``; the opposite of ``cut``."""
    return {name: tensor if tensor.shape == like[name].shape else _grown(tensor, like[name].shape) for name, tensor in weights.items()}


def _grown(tensor: Tensor, shape: torch.Size) -> Tensor:
    grown = tensor.new_zeros(shape)
    grown[: tensor.shape[0], : tensor.shape[1]] = tensor
    return grown


def stack(members: Sequence[Weights], shares: Sequence[float]) -> dict[str, Pair]:
    """Factors of ``sum_k share_k B_k A_k``, by module: ``[B_1 | B_2 | ...]`` and ``[share_1 A_1; share_2 A_2; ...]``, float64."""
    return {
        module: Pair(
            torch.cat([share * m[module + _A].double() for share, m in zip(shares, members, strict=True)]),
            torch.cat([m[module + _B].double() for m in members], dim=1),
        )
        for module, _ in pairs(members[0])
    }


def compress(pair: Pair, rank: int) -> Pair:
    """The best approximation of ``B A`` of a lower rank, in the Frobenius norm: ``B = U_r S_r``, ``A = V_r'``.

    QR of both factors, then the SVD of the small product of their triangles; nothing of size (outputs, inputs) is formed. Rows of A are
    of length 1 also where their singular value is zero, so that a gradient reaches the column of B: as many as the smallest of
    the pair's rank, inputs and outputs. What is asked for beyond is zero in both factors, which no gradient moves.
    Signs are fixed (the largest entry of every row of A is positive), so that equal inputs give equal factors.
    """
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    b, a = q_b @ (u[:, :rank] * s[:rank]), vt[:rank] @ q_a.T
    sign = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    return Pair(_grown(a * sign, torch.Size((rank, a.shape[1]))), _grown(b * sign.T, torch.Size((b.shape[0], rank))))


_WEAK = 0.1
"""Singular values below this share of the largest count as 0 where a residual is carried over: divided by one, it would be all that is sent."""


def carried(lost: Weights, old: Weights, new: Weights) -> Weights:
    """Residuals of factors, carried over to factors of other directions.

        e_B <- e_B A_old A_new^+,   e_A <- B_new^+ B_old e_A

    To first order a residual changes a product by ``e_B A + B e_A``; each term comes as near to what it was as the new factors allow.
    Tensors that are no factors stay as they are.

    Args:
        lost: by tensor.
        old: the factors that the residual belongs to, finite.
        new: those that it is to belong to, finite and of the same shapes.
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
    """Named factors in float32."""
    return named({module: Pair(pair.a.float(), pair.b.float()) for module, pair in modules})
