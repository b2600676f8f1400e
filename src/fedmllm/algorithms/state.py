"""What the server keeps, what a local rule knows about its client, and what a round's updates combine to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from fedmllm import weights as W
from fedmllm.types import BASE, UPDATE, Accepted, Population, Profile, Slots, Weights


@dataclass(frozen=True)
class Outstanding:
    """Clients that are still training while the server continues. Only asynchronous schedules have any.

    Attributes:
        clients: by client, in the order in which they started: the round of the weights that it trains from, and the simulated time at
            which it finishes.
        weights: the global weights that these clients train from, by round.
        clock: the current simulated time.
    """

    clients: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    weights: Mapping[int, Weights] = field(default_factory=dict)
    clock: float = 0.0


NONE_OUTSTANDING = Outstanding()
"""No outstanding clients, as between the rounds of a synchronous schedule."""


@dataclass(frozen=True)
class ServerState:
    """Everything the server keeps from one round to the next.

    Attributes:
        weights: the global weights, float32.
        round_num: number of finished rounds.
        slots: the method's other tensors by kind: ``BASE``, ``BASE_STEP``, and the kinds that the method documents.
        population: all clients. The round loop sets it; checkpoints do not contain it.
        accepted: by client, the last two rounds (counted from 0, ascending) whose weights it trained from and whose update was accepted.
            The round loop sets it. The client's stored state is the one that belongs to the last of these rounds.
        outstanding: clients that have not answered yet. The round loop sets it.
    """

    weights: Weights
    round_num: int = 0
    slots: Slots = field(default_factory=dict)
    population: Population = field(default_factory=Population)
    accepted: Accepted = field(default_factory=dict)
    outstanding: Outstanding = NONE_OUTSTANDING

    @property
    def base(self) -> Weights:
        """The slot ``BASE``: the sum of all updates merged into the frozen weights."""
        return self.slots.get(BASE, {})

    def after(self, weights: Weights, slots: Slots = MappingProxyType({})) -> ServerState:
        """Return the state one round later. Slots that are not given keep their values."""
        return replace(self, weights=weights, round_num=self.round_num + 1, slots={**self.slots, **slots})


@dataclass(frozen=True)
class Client:
    """What a local rule knows about its client.

    Attributes:
        name: the client's id.
        state: what the client kept from its last accepted local training; empty before the first.
        profile: the client's sample counts by modality.
    """

    name: str = ""
    state: Slots = field(default_factory=dict)
    profile: Profile = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """One client's contribution to an aggregate: its tensors by kind, and its share of the total weight. Shares sum to 1."""

    slots: Slots
    share: float


@dataclass(frozen=True)
class Aggregate:
    """The combined updates of one round.

    Attributes:
        mean: weighted means in float64, by kind: ``UPDATE``, and whatever else the clients sent.
        num_clients: number of updates in the aggregate.
        members: the individual updates. Only methods with ``needs_individual_updates`` get them, and ``mean`` is then empty.
    """

    mean: Slots
    num_clients: int
    members: tuple[Member, ...] = ()

    @property
    def update(self) -> Weights:
        """The mean update, in float64."""
        return self.mean[UPDATE]

    def mean_over_members(self, kind: str) -> Weights:
        """Return the weighted mean of the members' tensors of one kind, in float64."""
        mean = W.WeightedMean()
        for member in self.members:
            mean.add(member.slots[kind], member.share)
        return mean.value()
