"""Checks each answer of a round, folds usable updates into the aggregate, and records the others as refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import Aggregate, Algorithm, Chain, Member, ServerState
from fedmllm.errors import FederationError, listing
from fedmllm.models.lora import describe_mismatch
from fedmllm.privacy.client_level import ClientPrivacy
from fedmllm.types import UPDATE, Answer, ClientFailure, ClientUpdate, Record, Slots, Weights


@dataclass(frozen=True)
class Origin:
    """The server state that clients trained from, and the limits for their answers.

    Attributes:
        state: the server state that the clients received.
        largest: (``update`` or the name of a group of extra tensors, number of samples) -> the largest accepted norm; None for no limit.
        scale: factor that multiplies accepted updates.
    """

    state: ServerState
    largest: Callable[[str, int], float] | None = None
    scale: float = 1.0


class Intake:
    """A round's answers so far.

    Args:
        algorithm: the method, which defines the aggregation.
        state: the server state at the start of the round.
        ranks: LoRA ranks of clients whose rank differs from the server's.
        chain: update transforms; by default the method's own only.
        claim: client -> the largest number of samples that it may claim: the number it reported before the first round, 0 if it withholds the
            number, None if it did not report.
        privacy: the mechanism of client-level differential privacy; None for none.
        secure: whether clients hold their tensors back for secure aggregation. Then ``settle`` brings the aggregate.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        state: ServerState,
        ranks: Mapping[str, int] | None = None,
        chain: Chain | None = None,
        claim: Callable[[str], int | None] = lambda client: None,
        privacy: ClientPrivacy | None = None,
        secure: bool = False,
    ) -> None:
        self._algorithm, self._state, self._ranks, self._claim = algorithm, state, ranks or {}, claim
        self._chain = Chain(algorithm.transforms) if chain is None else chain
        self._privacy, self._secure = privacy, secure
        self.held: dict[str, float] = {}
        """Clients that hold an update back, with its weight."""
        self._answers: dict[str, ClientUpdate] = {}
        self._settled: Slots = {}
        self.accepted: dict[str, int] = {}
        """Clients whose updates are in the aggregate, with the round of the weights that each trained from."""
        self.reached: list[str] = []
        """Clients that received a task, once per task."""
        self.num_clients = 0
        """Number of updates in the aggregate."""
        self._means: dict[str, W.WeightedMean] = {}
        self._members: list[tuple[Slots, float]] = []
        self._num_samples = self._bytes_up = 0
        self._losses: dict[str, tuple[float, float]] = {}
        self._withheld: list[str] = []
        self._halvings: dict[str, int] = {}
        self._refused: list[Record] = []

    def take(self, answer: Answer, origin: Origin | None = None) -> None:
        """Add an update to the aggregate or refuse it; record a failure.

        Args:
            answer: the client's answer.
            origin: the state that the client trained from; by default the state at the start of the round, without a norm limit.
        """
        sent = origin or Origin(self._state)
        if not isinstance(answer, ClientFailure) or answer.reached:
            self.reached.append(answer.client)
        if isinstance(answer, ClientUpdate):
            self._bytes_up += W.num_bytes(answer.update, *answer.extras.values()) if answer.num_bytes is None else answer.num_bytes
        reason = answer.reason if isinstance(answer, ClientFailure) else self._refusal(answer, sent)
        if reason is not None:
            self._refused.append({"client": answer.client, "reason": reason})
        elif isinstance(answer, ClientUpdate) and answer.held:
            self._hold(answer, sent.state)
        elif isinstance(answer, ClientUpdate):
            self.fold(_scaled(answer, sent.scale), sent.state)
            self._note(answer, sent.state.round_num)

    def _hold(self, update: ClientUpdate, state: ServerState) -> None:
        """Note that a client holds an update back, and the weight that it has in the sum."""
        _, weight = self._algorithm.fold(state, update)
        self.held[update.client] = 1.0 if self._privacy else self._chain.weigh(weight, update, self._state)
        self.accepted[update.client], self._answers[update.client] = state.round_num, update

    def settle(self, means: Slots, clients: Sequence[str], left: Mapping[str, str]) -> None:
        """Take the result of secure aggregation.

        Args:
            means: means by kind, in float64; empty if there is no sum.
            clients: the clients in the sum.
            left: why other clients are not in it, by client.
        """
        self._settled, self.num_clients = means, len(clients)
        self.accepted = {name: number for name, number in self.accepted.items() if name in clients}
        self._refused += [{"client": name, "reason": reason} for name, reason in left.items()]
        for name, number in self.accepted.items():
            self._note(self._answers[name], number)

    def fold(self, update: ClientUpdate, state: ServerState | None = None) -> None:
        """Add a checked update to the aggregate.

        Args:
            update: the update.
            state: the state that the client trained from; by default the state at the start of the round.
        """
        slots, weight = self._algorithm.fold(state or self._state, update)
        weight = self._chain.weigh(weight, update, self._state)
        if self._privacy:
            slots, weight = self._privacy.bounded(slots, self._state.slots), 1.0
        if self._algorithm.needs_individual_updates:
            self._members.append((slots, weight))
        else:
            for kind, term in slots.items():
                self._means.setdefault(kind, W.WeightedMean()).add(term, 1.0 if kind in self._algorithm.uniform_extras else weight)
        self.accepted[update.client] = state.round_num if state else self._state.round_num
        self.num_clients += 1

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held for the updates so far. Constant in their number, unless the method needs individual updates."""
        members = sum(W.num_bytes(*slots.values()) for slots, _ in self._members)
        return members + sum(mean.num_bytes for mean in self._means.values()) + W.num_bytes(*self._settled.values())

    def aggregate(self) -> Aggregate:
        """Return the aggregate of the accepted updates.

        Raises:
            FederationError: if no update has a positive weight.
        """
        total = sum(weight for _, weight in self._members)
        if self._members and total <= 0:
            raise FederationError("no update has a positive weight, so there is no aggregate; check that the cohort's clients hold samples")
        members = tuple(Member(slots, weight / total) for slots, weight in self._members)
        means = self._settled
        if not self._secure:
            means = self._released(self._privacy) if self._privacy else {kind: mean.value() for kind, mean in self._means.items()}
        return self._chain.aggregate(Aggregate(means, self.num_clients, members), self._state)

    def _released(self, privacy: ClientPrivacy) -> Slots:
        """Return noisy means. They exist even if no client answered, because the absence of a release would reveal that."""
        sent = {name: tensor for name, tensor in self._state.weights.items() if self._algorithm.uploads(self._state.round_num, name)}
        zeros = privacy.kinds({UPDATE: sent})
        return privacy.released({**zeros, **{kind: mean.total for kind, mean in self._means.items()}}, self._state.slots)

    def _note(self, update: ClientUpdate, round_num: int) -> None:
        """Record the numbers that an accepted update reports."""
        self._num_samples += update.num_samples or 0
        if update.num_samples is None:
            self._withheld.append(update.client)
        if "loss" in update.metrics:
            self._losses[update.client] = (update.weight, update.metrics["loss"])
        if halvings := int(update.metrics.get("halvings", 0)):
            self._halvings[update.client] = halvings

    def _refusal(self, update: ClientUpdate, origin: Origin) -> str | None:
        round_num = origin.state.round_num
        if update.client in self.accepted:
            return "the client already sent an update in this round"
        if update.round_num not in (None, round_num):
            return f"the update answers round {(update.round_num or 0) + 1}, expected round {round_num + 1}"
        rank = self._ranks.get(update.client)
        if update.rank != rank:
            return f"the update is of rank {update.rank}, the client's rank is {rank}"
        if (claim := self._claim(update.client)) is not None and (update.num_samples or 0) > claim:
            return f"the update claims {update.num_samples:,} training samples, the client reported {claim:,} before the first round"
        if update.held != self._secure:
            return "the client holds its update back, which nobody asked for" if update.held else "the client sent its update in the clear"
        reported = {"steps": "steps" in update.metrics, "profile": bool(update.profile)}
        if lacking := sorted(fact for fact in self._algorithm.needs if not reported[fact]):
            return f"the update does not report {lacking[0]}, which the method needs"
        if update.held:
            return unlawful_count(update)
        sent = {n: tensor for n, tensor in origin.state.weights.items() if self._algorithm.uploads(round_num, n)}
        return refusal(update, factors.cut(sent, rank), self._algorithm.client_sends) or _too_large(update, origin)

    def missing(self, stage: str, needed: int) -> str:
        """Return the error message for a round with too few usable updates."""
        count, reasons = len(self.accepted), listing(f"{row['client']}: {row['reason']}" for row in self._refused)
        what = f"{count} usable updates, {needed} needed" if count else "no usable update"
        where = f"stage {stage}, round {self._state.round_num + 1}"
        return f"{where}: {what}:\n{reasons}\nfix the causes and rerun with --resume, or set failures.below to wait or skip"

    def record(self) -> Record:
        """Return the round's statistics over its clients. The loss is None if no client took a step."""
        weight = sum(count for count, _ in self._losses.values())
        return {
            "num_samples": self._num_samples,
            "loss": sum(count * loss for count, loss in self._losses.values()) / weight if weight else None,
            "losses": {client: loss for client, (_, loss) in self._losses.items()},
            "halvings": self._halvings,
            "withheld": self._withheld,
            "bytes_up": self._bytes_up,
            "bytes_held": self.num_bytes,
            "refused": self._refused,
        }


def _scaled(update: ClientUpdate, scale: float) -> ClientUpdate:
    """Multiply an update and its extra tensors by a number. Returns the update itself if the number is 1."""
    if scale == 1:
        return update
    groups = {
        kind: {name: tensor * scale for name, tensor in slot.items()} for kind, slot in {UPDATE: update.update, **update.extras}.items()
    }
    return replace(update, update=groups.pop(UPDATE), extras=groups)


def _too_large(update: ClientUpdate, origin: Origin) -> str | None:
    if origin.largest is None or update.num_samples is None:
        return None
    for kind, tensors in {UPDATE: update.update, **update.extras}.items():
        if (size := W.norm(tensors)) > (limit := origin.largest(kind, update.num_samples)):
            return f"the norm of the {kind} is {size:.3g}, the limit is {limit:.3g} (failures.norm_limit)"
    return None


def refusal(update: ClientUpdate, expected: Weights, extras: Sequence[str] = ()) -> str | None:
    """Return why an update cannot be used, or None if it can.

    An update is refused for wrong names or shapes, NaN or infinity, or a number of samples that is not positive.

    Args:
        update: the update.
        expected: tensors with the names and shapes that the update must have.
        extras: names of the groups of extra tensors that the method's clients send.
    """
    if sorted(update.extras) != sorted(extras):
        return f"the answer has extra tensors {sorted(update.extras) or 'none'}, expected {sorted(extras) or 'none'}"
    for kind, tensors in {UPDATE: update.update, **update.extras}.items():
        if mismatch := describe_mismatch(tensors, expected):
            return mismatch if kind == UPDATE else f"{kind}: {mismatch}"
        if not W.is_finite(tensors):
            return f"the {kind} contains NaN or infinity"
    return unlawful_count(update)


def unlawful_count(update: ClientUpdate) -> str | None:
    """Return why an update's number of samples is invalid, or None if it is not."""
    if update.num_samples is not None and update.num_samples <= 0:
        return f"num_samples is {update.num_samples}, it must be positive"
    return None
