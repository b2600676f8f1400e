"""Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. Blanchard et al., NeurIPS 2017: Krum and Multi-Krum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmllm import weights as W
from fedmllm.algorithms.checks import require_not_negative, require_positive
from fedmllm.algorithms.median import Median, stacked
from fedmllm.algorithms.state import Aggregate, ServerState
from fedmllm.errors import ConfigError
from fedmllm.types import UPDATE


@dataclass(frozen=True)
class Krum(Median):
    """Selects the update closest to its neighbors, or averages the ``num_selected`` closest ones (Multi-Krum).

        score_k = sum of ||D_k - D_j||^2 over the K - num_byzantine - 2 nearest j;    w <- w + mean of the D_k of lowest score

    Ties go to the client whose name sorts first. A round needs at least 2 num_byzantine + 3 clients, and at least
    num_selected + num_byzantine, so that the Byzantine ones can be left out. Flower's ``Krum`` is the same rule, but it computes distances
    from inner products of the weights in the dtype sent, where rounding can hide small updates. Its ``MultiKrum`` weights the selected
    updates by sample counts.

    Attributes:
        num_byzantine: number of clients per round that may send arbitrary updates.
        num_selected: number of updates to average.
    """

    num_byzantine: int = 1
    num_selected: int = 1

    def __post_init__(self) -> None:
        require_not_negative(num_byzantine=self.num_byzantine)
        require_positive(num_selected=self.num_selected)
        for name in ("num_byzantine", "num_selected"):
            if not isinstance(getattr(self, name), int):
                raise ConfigError(f"{name} must be an integer, got {getattr(self, name)}")

    @property
    def smallest_cohort(self) -> int:
        """The larger of ``2 num_byzantine + 3`` and ``num_selected + num_byzantine``."""
        return self.num_byzantine + max(self.num_byzantine + 3, self.num_selected)

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Add the mean of the selected updates."""
        names = aggregate.members[0].slots[UPDATE]
        updates = {name: stacked(aggregate.members, name) for name in names}
        chosen = self.choose(torch.cat([tensor.flatten(1) for tensor in updates.values()], dim=1))
        return state.after(W.add(state.weights, {name: tensor[chosen].mean(dim=0) for name, tensor in updates.items()}))

    def choose(self, updates: Tensor) -> Tensor:
        """Return the positions of the updates with the lowest scores.

        Args:
            updates: the flattened updates, shape (clients, coordinates).
        """
        squares = torch.cdist(updates, updates, compute_mode="donot_use_mm_for_euclid_dist").square()
        neighbors = max(1, len(updates) - self.num_byzantine - 2)
        scores = squares.sort(dim=1).values[:, 1 : 1 + neighbors].sum(dim=1)
        return scores.argsort(stable=True)[: self.num_selected]
