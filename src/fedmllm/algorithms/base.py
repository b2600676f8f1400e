"""What a federated method is: a rule for its clients and a rule for its server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.errors import ConfigError
from fedmllm.training.rules import LocalRule
from fedmllm.types import Accepted, Broadcast, ClientUpdate, Population, Profile, Slots, Weights

if TYPE_CHECKING:
    from fedmllm.algorithms.transforms import UpdateTransform

Kind = Literal["recommended", "classic", "robust", "lora", "one-shot", "personalized"]

Fact = Literal["steps", "profile"]
"""What a client may withhold: its number of optimizer steps, and its samples by modalities."""


@dataclass(frozen=True)
class Outstanding:
    """Clients that train while the server goes on, of a schedule that does not wait for them.

    Attributes:
        clients: in the order in which they were asked: the round of the weights that each trains from, and when it is done, in simulated time.
        weights: those weights, by round.
        clock: the simulated time so far.
    """

    clients: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    weights: Mapping[int, Weights] = field(default_factory=dict)
    clock: float = 0.0


NONE_OUTSTANDING = Outstanding()
"""Between rounds of a synchronous schedule."""


@dataclass(frozen=True)
class ServerState:
    """Everything the server must remember from one round to the next.

    Attributes:
        weights: the global weights, float32.
        round_num: rounds finished.
        slots: further tensors of the method by name: momentum and controls, shaped like the weights; ``base``, what has been
            merged into the frozen weights (by module, of full size); ``base_step``, the factors of the last round's part of it.
        population: all clients; set by the loop, not kept in checkpoints.
        accepted: by client, the last two rounds (counted from 0) whose weights it trained from and whose update was accepted, ascending; set by the
            loop. What a client keeps is what it kept in the last of them.
        outstanding: clients that have not answered yet; set by the loop.
    """

    weights: Weights
    round_num: int = 0
    slots: Slots = field(default_factory=dict)
    population: Population = field(default_factory=Population)
    accepted: Accepted = field(default_factory=dict)
    outstanding: Outstanding = NONE_OUTSTANDING

    @property
    def base(self) -> Weights:
        """What the frozen weights have gained, by module, without LoRA's factor alpha / r."""
        return self.slots.get("base", {})

    def after(self, weights: Weights, **slots: Weights) -> ServerState:
        """The state one round later; slots that are not given stay."""
        return replace(self, weights=weights, round_num=self.round_num + 1, slots={**self.slots, **slots})


@dataclass(frozen=True)
class Client:
    """A client as its rule sees it.

    Attributes:
        name: its id.
        state: what it kept from its last accepted turn; empty before the first.
        profile: its samples by modalities.
    """

    name: str = ""
    state: Slots = field(default_factory=dict)
    profile: Profile = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """One client's part of an aggregate: its tensors by what they are, and its share; shares sum to 1."""

    slots: Slots
    share: float


@dataclass(frozen=True)
class Aggregate:
    """What a round's updates come to.

    Attributes:
        mean: weighted means in float64 by what they are: ``update``, and what else the clients sent.
        num_clients: how many updates went in.
        members: each update by itself, only for methods that need it; ``mean`` is empty then.
    """

    mean: Slots
    num_clients: int
    members: tuple[Member, ...] = ()

    def mean_over_members(self, kind: str) -> Weights:
        """The weighted mean of what the members sent under a name, float64."""
        mean = W.WeightedMean()
        for member in self.members:
            mean.add(member.slots[kind], member.share)
        return mean.value()


class Algorithm(Protocol):
    """One method. Instances hold hyper-parameters only; all that changes is in the state."""

    kind: ClassVar[Kind]
    exact: ClassVar[bool]
    """Whether the aggregate of LoRA's factors has the mean of the clients' products: ``dW = sum_k p_k dW_k``."""
    heterogeneous_ranks: ClassVar[bool]
    """Whether clients may have ranks of their own."""
    personalized: ClassVar[bool]
    """Whether each client ends with a model of its own, which is then what the method is scored by."""
    needs_individual_updates: ClassVar[bool]
    """True where the server must see each update by itself, which rules out streaming and secure aggregation."""
    changes_frozen: ClassVar[bool]
    """Whether it adds to the frozen matrices, which must then be held in full."""
    ignores_weights: ClassVar[bool]
    """Whether clients count alike whatever their updates weigh, so that a strategy that reweighs them does nothing."""
    takes_stale_updates: ClassVar[bool]
    """Whether an update means the same to the server whatever weights it began from, so that a round may mix updates of several."""
    client_sends: ClassVar[tuple[str, ...]]
    """Names of the further tensors in an update, each named and shaped like the update."""
    uniform: ClassVar[tuple[str, ...]]
    """What of an update has the same weight from every client, whatever the update itself weighs."""
    splits_anew: ClassVar[bool]
    """Whether a round's factors have other directions than the last one's, so that a residual must be carried over to them."""

    @property
    def smallest_cohort(self) -> int:
        """Clients per round without which the rule has no meaning."""
        ...

    @property
    def needs(self) -> frozenset[Fact]:
        """What clients must tell of themselves; updates without it are refused."""
        ...

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        """What happens to updates between training and the server's step, before the experiment's own transforms."""
        ...

    @property
    def needs_labels(self) -> bool:
        """Whether its clients' rule reads how often each answer occurs over all clients (``Population.labels``)."""
        ...

    def init(self, weights: Weights, frozen: Weights) -> ServerState:
        """The state before the first round, from the adapter and the frozen matrices under it, by module, shape (outputs, inputs)."""
        ...

    def broadcast(self, state: ServerState) -> Broadcast:
        """What the cohort receives."""
        ...

    def uploads(self, round_num: int, name: str) -> bool:
        """Whether a client's update of that round holds a tensor."""
        ...

    def downloads(self, name: str) -> bool:
        """Whether a client must be sent a tensor of the global weights, or of the extras (``kind/name``); what never changes it has."""
        ...

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """How a client trains."""
        ...

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """What of an update enters the aggregate, and with which weight."""
        ...

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """The state after a round."""
        ...

    def personal(self, state: ServerState, client_state: Slots) -> Weights:
        """The weights a client ends with."""
        ...


class ServerAverage:
    """The common server: ``w <- w + D`` with D the mean update weighted by numbers of samples."""

    kind: ClassVar[Kind] = "classic"
    exact: ClassVar[bool] = False
    heterogeneous_ranks: ClassVar[bool] = False
    personalized: ClassVar[bool] = False
    needs_individual_updates: ClassVar[bool] = False
    changes_frozen: ClassVar[bool] = False
    ignores_weights: ClassVar[bool] = False
    takes_stale_updates: ClassVar[bool] = True
    client_sends: ClassVar[tuple[str, ...]] = ()
    uniform: ClassVar[tuple[str, ...]] = ()
    splits_anew: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    """Whether every client counts alike, rather than by its number of samples."""

    @property
    def smallest_cohort(self) -> int:
        """One."""
        return 1

    @property
    def needs(self) -> frozenset[Fact]:
        """Nothing."""
        return frozenset()

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        """None."""
        return ()

    @property
    def needs_labels(self) -> bool:
        """No."""
        return False

    def init(self, weights: Weights, frozen: Weights) -> ServerState:
        """The weights alone."""
        return ServerState(weights)

    def broadcast(self, state: ServerState) -> Broadcast:
        """The global weights, what was merged into the frozen ones, and the population."""
        step = state.slots.get("base_step", {})
        return Broadcast(state.round_num, state.weights, base=state.base, base_step=step, population=state.population)

    def uploads(self, round_num: int, name: str) -> bool:
        """Everything."""
        return True

    def downloads(self, name: str) -> bool:
        """Everything."""
        return True

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Nothing beside the loss."""
        return LocalRule()

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """The update and what came with it, by number of samples or by head."""
        return {"update": update.update, **update.extras}, 1.0 if self.by_head else update.weight

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Add the mean update, in float64, rounded once to float32."""
        return state.after(W.add(state.weights, aggregate.mean["update"]))

    def personal(self, state: ServerState, client_state: Slots) -> Weights:
        """The global weights."""
        return state.weights


def client_weights(state: ServerState, update: ClientUpdate) -> Weights:
    """What a client ended with, at its own rank: what it was sent, plus its update."""
    return W.add(factors.cut(state.weights, update.rank), update.update)


def mean_of_others(aggregate: Aggregate) -> Weights:
    """The members' weighted mean of the ``weights`` that are no factors of LoRA, float32."""
    mean = W.WeightedMean()
    for member in aggregate.members:
        mean.add(factors.others(member.slots["weights"]), member.share)
    return {name: tensor.float() for name, tensor in mean.value().items()}


def merge(state: ServerState, gained: Mapping[str, factors.Pair]) -> dict[str, Weights]:
    """The slots after products of factors have been added to the frozen weights.

    ``base_step`` keeps the factors, in float32: they are what every client must be sent.
    """
    step = factors.to_float(gained.items())
    return {"base": factors.accumulated(state.base, step), "base_step": step}


def zeros(weights: Weights) -> Weights:
    """Zeros in float64, for a server's own sums."""
    return W.zeros_like(weights, torch.float64)


def require_within(name: str, value: float, low: float, high: float) -> None:
    """Refuse a hyper-parameter outside [low, high).

    Raises:
        ConfigError: naming it.
    """
    if not low <= value < high:
        raise ConfigError(f"{name} must lie in [{low:g}, {high:g}), is {value}")


def require_positive(**values: float) -> None:
    """Refuse hyper-parameters that are not above 0.

    Raises:
        ConfigError: naming the first.
    """
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name} must be above 0, is {value}")


def require_not_negative(**values: float) -> None:
    """Refuse hyper-parameters below 0.

    Raises:
        ConfigError: naming the first.
    """
    for name, value in values.items():
        if value < 0:
            raise ConfigError(f"{name} must not be negative, is {value}")
