"""The updates of a round: checked one by one, refused or aggregated, and what is told about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import Aggregate, Aggregator, Algorithm, ServerState
from fedmllm.errors import FederationError, listing
from fedmllm.models.lora import describe_mismatch
from fedmllm.types import ClientUpdate, Record, Weights


class Intake:
    """Updates taken in so far, and what is told about them.

    Args:
        algorithm: how updates are aggregated.
        state: the server's, at the start of the round.
        ranks: clients' own LoRA ranks.
    """

    def __init__(self, algorithm: Algorithm, state: ServerState, ranks: Mapping[str, int]) -> None:
        self._algorithm, self._state, self._ranks = algorithm, state, ranks
        self._aggregator = Aggregator(algorithm, state)
        self._num_samples = self._bytes_up = 0
        self._losses: list[tuple[int, float]] = []
        self._refused: list[Record] = []

    def take(self, update: ClientUpdate) -> None:
        """Add an update to the aggregate, or refuse it."""
        sent = W.num_bytes(update.update, *update.extras.values()) if update.num_bytes is None else update.num_bytes
        self._bytes_up += sent
        if reason := self._refusal(update):
            self._refused.append({"client": update.client, "reason": reason})
            return
        self._aggregator.add(update)
        self._num_samples += update.num_samples
        if "loss" in update.metrics:
            self._losses.append((update.num_samples, update.metrics["loss"]))

    def _refusal(self, update: ClientUpdate) -> str | None:
        rank = self._ranks.get(update.client)
        if update.rank != rank:
            return f"the update is of rank {update.rank}, the client's rank is {rank}"
        sent = {n: tensor for n, tensor in self._state.weights.items() if self._algorithm.uploads(self._state.round_num, n)}
        return refusal(update, factors.cut(sent, rank), self._algorithm.client_sends)

    def aggregate(self, stage: str) -> Aggregate:
        """What the updates come to.

        Raises:
            FederationError: if none can be used.
        """
        if self._num_samples == 0:
            reasons = listing(f"{row['client']}: {row['reason']}" for row in self._refused)
            raise FederationError(
                f"stage {stage}, round {self._state.round_num + 1}: no update can be used:\n{reasons}\ntry a lower training.learning_rate"
            )
        return self._aggregator.value()

    def record(self) -> Record:
        """The round's numbers about its clients; the loss is None where none of them took a step."""
        weight = sum(count for count, _ in self._losses)
        return {
            "num_samples": self._num_samples,
            "loss": sum(count * loss for count, loss in self._losses) / weight if weight else None,
            "bytes_up": self._bytes_up,
            "bytes_held": self._aggregator.num_bytes,
            "refused": self._refused,
        }


def refusal(update: ClientUpdate, expected: Weights, extras: Sequence[str] = ()) -> str | None:
    """Why an update cannot be used: wrong names or shapes, NaN or infinity, no samples. None if it can."""
    if sorted(update.extras) != sorted(extras):
        return f"besides the update it holds {sorted(update.extras) or 'nothing'}, expected {sorted(extras) or 'nothing'}"
    for kind, tensors in {"update": update.update, **update.extras}.items():
        if mismatch := describe_mismatch(tensors, expected):
            return mismatch if kind == "update" else f"{kind}: {mismatch}"
        if not W.is_finite(tensors):
            return f"the {kind} holds NaN or infinity"
    if update.num_samples <= 0:
        return f"num_samples is {update.num_samples}"
    return None
