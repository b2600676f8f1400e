"""You Only Communicate Once: One-shot Federated Low-Rank Adaptation of MLLM. Xu et al., NeurIPS 2025 (YOCO)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.checks import require_not_negative, require_within
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.median import stacked
from fedmllm.algorithms.state import Aggregate, Client, Member, ServerState
from fedmllm.errors import ConfigError
from fedmllm.training.rules import LocalRule
from fedmllm.training.terms import LossTerm, Parameters
from fedmllm.types import BASE, UPDATE, Broadcast, Weights

SIGNS = "signs"
"""The signs of B_0, which the server keeps and clients derive from the frozen weights."""


@dataclass(frozen=True)
class YOCO(FedAvg):
    """Supervises local training with the leading directions of the pretrained weights, so that one round is enough for clients to agree.

        start:   W = U S V',   A_0 = sqrt(S_r) V_r',   B_0 = U_r sqrt(S_r),   W <- W - (alpha / r) B_0 A_0
        client:  loss + sum_B sign_weight ||tanh(g B) - sign(B_0)|| / (||sign(B_0)|| + 1e-6) + sparse_weight sum |A|
        server:  B <- sum_k p_k B_k;   A <- sum_k p_k A_k P P',   P the leading principal directions of the clients' A

    g rises from 1 to ``gamma`` over a client's steps along half a cosine. For each tensor, P holds the fewest directions that retain
    ``energy`` of the squared norm of the clients' A, without centering. With all directions, A is the mean. The paper specifies neither
    the number of directions nor the centering. Norms are Frobenius norms, per tensor.

    The method is designed for one round of all clients with ten local epochs (``experiments/one_shot.yaml``). More rounds work; the signs
    of the initial B_0 remain the reference.

    Attributes:
        sign_weight: weight of the loss on the signs of B.
        gamma: final value of g. The paper tunes it between 5 and 300.
        sparse_weight: weight of the 1-norm of A. The paper tunes it between 1e-4 and 0.1.
        energy: share of the squared norm that the directions retain, in (0, 1].
        reference: use the variant of the released code: the SVD sets only B and is not subtracted from W; the term
            ``o ||A'A - I||^2``, with o falling from 0.1 to 0.01 as g rises, replaces the 1-norm; A and B are plain means.
    """

    sign_weight: float = 1.0
    gamma: float = 200.0
    sparse_weight: float = 1e-4
    energy: float = 0.95
    reference: bool = False
    kind = "one-shot"
    needs_individual_updates = True
    changes_frozen = True
    takes_stale_updates = False

    def __post_init__(self) -> None:
        require_not_negative(sign_weight=self.sign_weight, sparse_weight=self.sparse_weight)
        require_within("gamma", self.gamma, 1, math.inf)
        require_within("energy", self.energy, 1e-9, 1 + 1e-9)

    def init(self, weights: Weights, frozen: Weights) -> ServerState:
        """Split the frozen weights into initial factors, and subtract their product from the frozen weights.

        Raises:
            ConfigError: if a frozen matrix is quantized.
        """
        if missing := [module for module, _ in factors.pairs(weights) if module not in frozen]:
            raise ConfigError(f"yoco splits the frozen weights, but {missing[0]} is quantized; load the model in bfloat16")
        pairs = {module: self._split(frozen[module], pair) for module, pair in factors.pairs(weights)}
        start = {**weights, **factors.named(pairs)}
        signs = {SIGNS: {name: tensor.sign() for name, tensor in start.items() if factors.is_b(name)}}
        base = {} if self.reference else {BASE: {module: -pair.product().float() for module, pair in pairs.items()}}
        return ServerState(start, slots={**signs, **base})

    def _split(self, weight: Tensor, pair: factors.Pair) -> factors.Pair:
        """Return the leading singular directions of a frozen matrix as factors, each scaled by the roots of the singular values."""
        rank = len(pair.a)
        u, s, vt = torch.linalg.svd(weight.detach().double().cpu(), full_matrices=False)
        half = s[:rank].sqrt()
        return factors.Pair(pair.a if self.reference else (half[:, None] * vt[:rank]).float(), (u[:, :rank] * half).float())

    def broadcast(self, state: ServerState) -> Broadcast:
        """Also pass the signs of B_0."""
        return replace(super().broadcast(state), extras={SIGNS: state.slots[SIGNS]})

    def downloads(self, name: str) -> bool:
        """Download everything but the signs, which every client can derive from the frozen weights."""
        return not name.startswith(f"{SIGNS}/")

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Add the terms of the class's client rule."""
        return LocalRule(terms=(Supervision(self, broadcast.extras[SIGNS]),))

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Apply the class's server rule."""
        update = aggregate.mean_over_members(UPDATE)
        if not self.reference:
            update |= {name: self._principal(aggregate.members, name, state.weights[name]) for name in update if factors.is_a(name)}
        return state.after(W.add(state.weights, update))

    def _principal(self, members: tuple[Member, ...], name: str, old: Tensor) -> Tensor:
        """Return the change of A: the mean of the clients' A projected onto their leading directions, minus the old A."""
        own = (stacked(members, name) + old.double()).flatten(1)
        shares = torch.tensor([member.share for member in members], dtype=torch.float64)
        _, s, vt = torch.linalg.svd(own, full_matrices=False)
        kept = s.square().cumsum(0) / s.square().sum().clamp(min=torch.finfo(s.dtype).tiny)
        directions = vt[: 1 + int((kept < self.energy - 1e-12).sum())]
        mean: Tensor = (shares @ own @ directions.T @ directions).reshape(old.shape)
        return mean - old.double()


@dataclass(frozen=True, eq=False)
class Supervision(LossTerm):
    """The loss terms of ``YOCO``'s client rule, or those of its ``reference`` variant.

    Attributes:
        method: the method whose hyperparameters apply.
        signs: signs of B_0, by the name of B.
    """

    method: YOCO
    signs: Parameters

    def value(self, now: Parameters, received: Parameters, progress: float) -> Tensor:
        """Return the sum of the terms."""
        method = self.method
        gamma = method.gamma - 0.5 * (method.gamma - 1) * (1 + math.cos(math.pi * progress))
        terms = [method.sign_weight * _sign_loss(now[name], gamma, sign.to(now[name])) for name, sign in self.signs.items()]
        spread = self._orthogonality(gamma) if method.reference else method.sparse_weight
        terms += [spread * (_unorthogonal(a) if method.reference else a.abs().sum()) for n, a in now.items() if factors.is_a(n)]
        return torch.stack(terms).sum()

    def _orthogonality(self, gamma: float) -> float:
        """Return the weight of the orthogonality term, which falls linearly from 0.1 at g = 1 to 0.01 at g = ``gamma``."""
        return 0.1 - 0.09 * (gamma - 1) / max(self.method.gamma - 1, 1e-9)


def _sign_loss(b: Tensor, gamma: float, sign: Tensor) -> Tensor:
    # The gradient of a norm is undefined at 0; clamping to the smallest float keeps the square root's gradient finite.
    distance = ((gamma * b).tanh() - sign).square().sum().clamp(min=torch.finfo(b.dtype).tiny).sqrt()
    loss: Tensor = distance / (sign.norm() + 1e-6)
    return loss


def _unorthogonal(a: Tensor) -> Tensor:
    """Return ``||A'A - I||^2``, computed from the small Gram matrix as ``||A A'||^2 - 2 ||A||^2 + inputs``."""
    loss: Tensor = (a @ a.T).square().sum() - 2 * a.square().sum() + a.shape[1]
    return loss
