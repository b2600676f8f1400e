"""The updates of a round: checked one by one, refused or aggregated, and what is told about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import Aggregate, Aggregator, Algorithm, ServerState
from fedmllm.errors import listing
from fedmllm.models.lora import describe_mismatch
from fedmllm.types import Answer, ClientFailure, ClientUpdate, Record, Weights


class Intake:
    """Updates taken in so far, and what is told about them.

    Args:
        algorithm: how updates are aggregated.
        state: the server's, at the start of the round.
        ranks: clients' own LoRA ranks.
        largest: what it is of (``update``, or what the method sends besides) and number of samples -> the largest norm that is taken; None for
            any.
        claim: client -> the number of samples it told of before the first round, 0 if it withholds that; None where that is not known.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        state: ServerState,
        ranks: Mapping[str, int],
        largest: Callable[[str, int], float] | None = None,
        claim: Callable[[str], int | None] = lambda client: None,
    ) -> None:
        self._algorithm, self._state, self._ranks, self._largest, self._claim = algorithm, state, ranks, largest, claim
        self._aggregator = Aggregator(algorithm, state)
        self.accepted: set[str] = set()
        """Clients whose updates are in the aggregate."""
        self._num_samples = self._bytes_up = 0
        self._losses: dict[str, tuple[float, float]] = {}
        self._withheld: list[str] = []
        self._halvings: dict[str, int] = {}
        self._refused: list[Record] = []

    def take(self, update: Answer) -> None:
        """Add an update to the aggregate, or refuse it; note a failure."""
        if isinstance(update, ClientFailure):
            self._refused.append({"client": update.client, "reason": update.reason})
            return
        sent = W.num_bytes(update.update, *update.extras.values()) if update.num_bytes is None else update.num_bytes
        self._bytes_up += sent
        if reason := self._refusal(update):
            self._refused.append({"client": update.client, "reason": reason})
            return
        self._aggregator.add(update)
        self.accepted.add(update.client)
        self._num_samples += update.num_samples or 0
        if update.num_samples is None:
            self._withheld.append(update.client)
        if "loss" in update.metrics:
            self._losses[update.client] = (update.weight, update.metrics["loss"])
        if halvings := int(update.metrics.get("halvings", 0)):
            self._halvings[update.client] = halvings

    def _refusal(self, update: ClientUpdate) -> str | None:
        if update.client in self.accepted:
            return "this client's update is there already"
        if update.round_num not in (None, self._state.round_num):
            return f"it answers round {(update.round_num or 0) + 1}, this is round {self._state.round_num + 1}"
        rank = self._ranks.get(update.client)
        if update.rank != rank:
            return f"the update is of rank {update.rank}, the client's rank is {rank}"
        if (claim := self._claim(update.client)) is not None and (update.num_samples or 0) > claim:
            return f"it says that it trained on {update.num_samples:,} samples, it has told of {claim:,}"
        told = {"steps": "steps" in update.metrics, "profile": bool(update.profile)}
        if lacking := sorted(fact for fact in self._algorithm.needs if not told[fact]):
            return f"it does not tell its {lacking[0]}, which the method needs"
        sent = {n: tensor for n, tensor in self._state.weights.items() if self._algorithm.uploads(self._state.round_num, n)}
        return refusal(update, factors.cut(sent, rank), self._algorithm.client_sends) or self._too_large(update)

    def _too_large(self, update: ClientUpdate) -> str | None:
        if self._largest is None or update.num_samples is None:
            return None
        for kind, tensors in {"update": update.update, **update.extras}.items():
            if (size := W.norm(tensors)) > (limit := self._largest(kind, update.num_samples)):
                return f"the norm of the {kind} is {size:.3g}, training could give {limit:.3g} at most (failures.norm_limit)"
        return None

    def missing(self, stage: str, needed: int) -> str:
        """What to say where too few updates can be used."""
        count, reasons = len(self.accepted), listing(f"{row['client']}: {row['reason']}" for row in self._refused)
        what = f"{count} updates can be used, {needed} are needed" if count else "no update can be used"
        where = f"stage {stage}, round {self._state.round_num + 1}"
        return f"{where}: {what}:\n{reasons}\nlook into the reasons and go on with --resume, or have failures.below wait or skip"

    def aggregate(self) -> Aggregate:
        """What the updates come to.

        Raises:
            FederationError: if none has a positive weight.
        """
        return self._aggregator.value()

    def record(self) -> Record:
        """The round's numbers about its clients; the loss is None where none of them took a step."""
        weight = sum(count for count, _ in self._losses.values())
        return {
            "num_samples": self._num_samples,
            "loss": sum(count * loss for count, loss in self._losses.values()) / weight if weight else None,
            "losses": {client: loss for client, (_, loss) in self._losses.items()},
            "halvings": self._halvings,
            "withheld": self._withheld,
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
    if update.num_samples is not None and update.num_samples <= 0:
        return f"num_samples is {update.num_samples}"
    return None
