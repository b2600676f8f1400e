"""Federated Fine-tuning of LLMs under Heterogeneous Tasks and Client Resources. Bai et al., NeurIPS 2024 (FlexLoRA)."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm import factors
from fedmllm.algorithms.base import Aggregate, ServerState, mean_of_others
from fedmllm.algorithms.flora import FLoRA


@dataclass(frozen=True)
class FlexLoRA(FLoRA):
    """The best approximation of rank r of the mean product, re-split into factors.

        U S V' = sum_k p_k B_k A_k + B[:, R:] A[R:],   B <- U_r S_r,   A <- V_r'

    R is the largest rank of the cohort: directions beyond it, which none of its clients was sent, stay in the product as they are (the
    paper does not say; left out, they would be forgotten, and with clients whose ranks sum to less than r no gradient would ever
    move them again). The sum is never formed: QR of the stacked factors, then the SVD of a core of K r by K r numbers (the form known
    as HLoRA, which leaves the singular values with A; here B has them, as in the paper, so that A keeps the scale of its
    initialization). A
    client of rank r_k receives the first r_k columns and rows, which is the best approximation of its rank.
    """

    exact = False
    changes_frozen = False
    splits_anew = True

    def downloads(self, name: str) -> bool:
        """Everything."""
        return True

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The rule above."""
        members = [m.slots["weights"] for m in aggregate.members]
        unheld = factors.beyond(state.weights, max(map(factors.rank, members)))
        stacked = factors.stack([*members, unheld], [*(m.share for m in aggregate.members), 1.0])
        rank = {module: len(pair.a) for module, pair in factors.pairs(state.weights)}
        compressed = ((module, factors.compress(pair, rank[module])) for module, pair in stacked.items())
        return state.after({**state.weights, **factors.to_float(compressed), **mean_of_others(aggregate)})
