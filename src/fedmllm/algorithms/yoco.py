"""You Only Communicate Once: One-shot Federated Low-Rank Adaptation of MLLM. Xu et al., NeurIPS 2025 (YOCO)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.base import Aggregate, Client, Member, ServerState, require_not_negative, require_within
from fedmllm.algorithms.fedavg import FedAvg
from fedmllm.algorithms.median import stacked
from fedmllm.errors import ConfigError
from fedmllm.training.rules import LocalRule
from fedmllm.training.terms import LossTerm, Parameters
from fedmllm.types import Broadcast, Weights


@dataclass(frozen=True)
class YOCO(FedAvg):
    """The directions of the pretrained weights supervise local training, so that clients agree after a single exchange.

        start:   W = U S V',   A_0 = sqrt(S_r) V_r',   B_0 = U_r sqrt(S_r),   W <- W - (alpha / r) B_0 A_0
        client:  loss + sum_B sign_weight ||tanh(g B) - sign(B_0)|| / (||sign(B_0)|| + 1e-6) + sparse_weight sum |A|
        server:  B <- sum_k p_k B_k;   A <- sum_k p_k A_k P P',   P the leading principal directions of the clients' A

    g goes from 1 to ``gamma`` over a client's steps on half a cosine. P holds as few directions as keep ``energy`` of the clients'
    squared length, tensor by tensor, without centering; with all of them A is the mean. The text of the paper leaves the number of
    directions and the centering open. Norms are Frobenius norms, per tensor.

    It is meant for one round of all clients with ten local epochs (``experiments/one_shot.yaml``); more rounds work, and keep
    the signs of the start as the reference.

    Attributes:
        sign_weight: of the loss on the signs of B.
        gamma: the last g; the paper tunes it between 5 and 300.
        sparse_weight: of the 1-norm of A; the paper tunes it between 1e-4 and 0.1.
        energy: share of squared length that the directions keep, in (0, 1].
        reference: the variant of the released code: the SVD sets B alone and is not taken off W; instead of the 1-norm a term
            ``o ||A'A - I||^2`` with o falling from 0.1 to 0.01 as g rises; plain means of A and B.
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
        """Factors from the frozen weights, which the product is taken off.

        Raises:
            ConfigError: if a frozen matrix is not there in full.
        """
        if missing := [module for module, _ in factors.pairs(weights) if module not in frozen]:
            raise ConfigError(f"yoco splits the frozen weights, but {missing[0]} is held in few bits; load the model in bfloat16")
        pairs = {module: self._split(frozen[module], pair) for module, pair in factors.pairs(weights)}
        start = {**weights, **factors.named(pairs)}
        signs = {"signs": {name: tensor.sign() for name, tensor in start.items() if factors.is_b(name)}}
        base = {} if self.reference else {"base": {module: -pair.product().float() for module, pair in pairs.items()}}
        return ServerState(start, slots={**signs, **base})

    def _split(self, weight: Tensor, pair: factors.Pair) -> factors.Pair:
        """The leading singular directions of a frozen matrix, half of each singular value on either side."""
        rank = len(pair.a)
        u, s, vt = torch.linalg.svd(weight.detach().double().cpu(), full_matrices=False)
        half = s[:rank].sqrt()
        return factors.Pair(pair.a if self.reference else (half[:, None] * vt[:rank]).float(), (u[:, :rank] * half).float())

    def broadcast(self, state: ServerState) -> Broadcast:
        """The signs besides."""
        return replace(super().broadcast(state), extras={"signs": state.slots["signs"]})

    def downloads(self, name: str) -> bool:
        """Not the signs: they follow from the frozen weights, which every client has."""
        return not name.startswith("signs/")

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """The rule above."""
        return LocalRule(terms=(Supervision(self, broadcast.extras["signs"]),))

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The rule above."""
        update = aggregate.mean_over_members("update")
        if not self.reference:
            update |= {name: self._principal(aggregate.members, name, state.weights[name]) for name in update if factors.is_a(name)}
        return state.after(W.add(state.weights, update))

    def _principal(self, members: tuple[Member, ...], name: str, old: Tensor) -> Tensor:
        """Where the mean of the clients' A lies within their leading directions, less where it was."""
        own = (stacked(members, name) + old.double()).flatten(1)
        shares = torch.tensor([member.share for member in members], dtype=torch.float64)
        _, s, vt = torch.linalg.svd(own, full_matrices=False)
        kept = s.square().cumsum(0) / s.square().sum().clamp(min=torch.finfo(s.dtype).tiny)
        directions = vt[: 1 + int((kept < self.energy - 1e-12).sum())]
        mean: Tensor = (shares @ own @ directions.T @ directions).reshape(old.shape)
        return mean - old.double()


@dataclass(frozen=True, eq=False)
class Supervision(LossTerm):
    """The terms beside the loss in ``YOCO``'s second line, or those of its ``reference``.

    Attributes:
        method: whose hyper-parameters hold.
        signs: of B_0, by the name of B.
    """

    method: YOCO
    signs: Parameters

    def value(self, now: Parameters, received: Parameters, progress: float) -> Tensor:
        """Their sum."""
        method = self.method
        gamma = method.gamma - 0.5 * (method.gamma - 1) * (1 + math.cos(math.pi * progress))
        terms = [method.sign_weight * _sign_loss(now[name], gamma, sign.to(now[name])) for name, sign in self.signs.items()]
        spread = self._orthogonality(gamma) if method.reference else method.sparse_weight
        terms += [spread * (_unorthogonal(a) if method.reference else a.abs().sum()) for n, a in now.items() if factors.is_a(n)]
        return torch.stack(terms).sum()

    def _orthogonality(self, gamma: float) -> float:
        """From 0.1 at g = 1 to 0.01 at g = ``gamma``, on a line."""
        return 0.1 - 0.09 * (gamma - 1) / max(self.method.gamma - 1, 1e-9)


def _sign_loss(b: Tensor, gamma: float, sign: Tensor) -> Tensor:
    # A norm has no gradient at 0; the smallest float keeps the square root's finite there.
    distance = ((gamma * b).tanh() - sign).square().sum().clamp(min=torch.finfo(b.dtype).tiny).sqrt()
    loss: Tensor = distance / (sign.norm() + 1e-6)
    return loss


def _unorthogonal(a: Tensor) -> Tensor:
    """``||A'A - I||^2`` through the small Gram matrix: ``||A A'||^2 - 2 ||A||^2 + inputs``."""
    loss: Tensor = (a @ a.T).square().sum() - 2 * a.square().sum() + a.shape[1]
    return loss
