"""Federated Fine-tuning of LLMs under Heterogeneous Tasks and Client Resources. Bai et al., NeurIPS 2024 (FlexLoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm.algorithms.base import mean_of_others
from fedmllm.algorithms.flora import FLoRA
from fedmllm.algorithms.state import Aggregate, ServerState
from fedmllm.types import WEIGHTS


@dataclass(frozen=True)
class FlexLoRA(FLoRA):
    """Approximates the mean product optimally at rank r and splits it into new factors.

        U S V' = sum_k p_k B_k A_k + B[:, R:] A[R:],   B <- U_r S_r,   A <- V_r'

    R is the largest rank in the cohort. The server sent no client the directions beyond R, so they stay in the product unchanged. The
    paper does not discuss them. Without this term they would be lost, and if the clients' ranks sum to less than r, no gradient could
    ever restore them.

    The sum is never formed. The server computes a QR decomposition of the stacked factors and then the SVD of a K r by K r core. This
    form is known as HLoRA, which leaves the singular values in A. Here they are in B, as in the FlexLoRA paper, so that A keeps the
    scale of its initialization. A client of rank r_k receives the first r_k columns and rows, which are the best approximation at its
    rank.
    """

    exact = False
    changes_frozen = False
    refactorizes = True

    def downloads(self, name: str) -> bool:
        """Download every tensor, because both factors change in each round."""
        return True

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Stack the clients' factors, compress the product to rank r, and average all other tensors."""
        members = [m.slots[WEIGHTS] for m in aggregate.members]
        unheld = factors.beyond(state.weights, max(map(factors.rank, members)))
        stacked = factors.stack([*members, unheld], [*(m.share for m in aggregate.members), 1.0])
        rank = {module: len(pair.a) for module, pair in factors.pairs(state.weights)}
        compressed = ((module, factors.compress(pair, rank[module])) for module, pair in stacked.items())
        return state.after({**state.weights, **factors.to_float(compressed), **mean_of_others(aggregate)})
