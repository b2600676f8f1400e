"""The interface of a federated method: how its clients train, and how its server aggregates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms.state import Aggregate, Client, ServerState
from fedmllm.training.rules import LocalRule
from fedmllm.types import BASE, BASE_STEP, UPDATE, WEIGHTS, Broadcast, ClientUpdate, Slots, Weights

if TYPE_CHECKING:
    from fedmllm.algorithms.transforms import UpdateTransform

Kind = Literal["classic", "robust", "lora", "one-shot", "personalized"]

Fact = Literal["steps", "profile"]
"""What a client may choose not to report: its number of optimizer steps, or its sample counts by modality (its profile)."""


class Algorithm(Protocol):
    """A federated method. Instances hold only hyperparameters; everything that changes lives in ``ServerState``."""

    kind: ClassVar[Kind]
    exact: ClassVar[bool]
    """Whether the product of the aggregated LoRA factors equals the mean of the clients' products: ``dW = sum_k p_k dW_k``."""
    heterogeneous_ranks: ClassVar[bool]
    """Whether clients may have different LoRA ranks."""
    personalized: ClassVar[bool]
    """Whether each client ends with a personalized model. The method is then scored on these models."""
    needs_individual_updates: ClassVar[bool]
    """Whether the server must see each update individually, which rules out streaming and secure aggregation."""
    changes_frozen: ClassVar[bool]
    """Whether the method adds to the frozen matrices, which must then not be quantized."""
    ignores_weights: ClassVar[bool]
    """Whether the server ignores the weights of updates, so that a strategy that reweighs updates has no effect."""
    takes_stale_updates: ClassVar[bool]
    """Whether the server can apply an update regardless of which round's weights it started from, so that one round may mix several."""
    client_sends: ClassVar[tuple[str, ...]]
    """Names of the extra tensor sets that clients send. Each has the tensor names and shapes of the update."""
    uniform_extras: ClassVar[tuple[str, ...]]
    """Names of the extra tensor sets that are averaged with uniform weights, even where updates are weighted."""
    refactorizes: ClassVar[bool]
    """Whether the server re-splits the product into new factors each round, so that a residual must be translated to the new factors."""

    @property
    def smallest_cohort(self) -> int:
        """The smallest number of clients per round for which the rule is defined."""
        ...

    @property
    def needs(self) -> frozenset[Fact]:
        """What clients must report about themselves. Updates without it are rejected."""
        ...

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        """The method's own update transforms. They apply before the experiment's."""
        ...

    @property
    def needs_labels(self) -> bool:
        """Whether the local rule reads how often each answer occurs over all clients (``Population.labels``)."""
        ...

    def init(self, weights: Weights, frozen: Weights) -> ServerState:
        """Return the state before the first round.

        Args:
            weights: the initial adapter.
            frozen: the frozen matrices under the adapter, by module, each of shape (outputs, inputs).
        """
        ...

    def broadcast(self, state: ServerState) -> Broadcast:
        """Return what the server sends to the cohort."""
        ...

    def uploads(self, round_num: int, name: str) -> bool:
        """Return whether a client's update in this round contains the tensor."""
        ...

    def downloads(self, name: str) -> bool:
        """Return whether clients must be sent this tensor of the global weights or of the extras (``kind/name``).

        Clients already hold tensors that never change.
        """
        ...

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Return how a client trains."""
        ...

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """Return the tensors that an update adds to the aggregate, by kind, and the update's weight."""
        ...

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Return the state after the round."""
        ...

    def personal(self, state: ServerState, client_state: Slots) -> Weights:
        """Return a client's final weights: its personalized model, or the global one."""
        ...


class ServerAverage:
    """The default server: ``w <- w + D``, where D is the mean update weighted by sample counts."""

    kind: ClassVar[Kind] = "classic"
    exact: ClassVar[bool] = False
    heterogeneous_ranks: ClassVar[bool] = False
    personalized: ClassVar[bool] = False
    needs_individual_updates: ClassVar[bool] = False
    changes_frozen: ClassVar[bool] = False
    ignores_weights: ClassVar[bool] = False
    takes_stale_updates: ClassVar[bool] = True
    client_sends: ClassVar[tuple[str, ...]] = ()
    uniform_extras: ClassVar[tuple[str, ...]] = ()
    refactorizes: ClassVar[bool] = False
    uniform_weights: ClassVar[bool] = False
    """Whether updates are averaged with uniform weights instead of sample counts."""

    @property
    def smallest_cohort(self) -> int:
        """A single client is enough."""
        return 1

    @property
    def needs(self) -> frozenset[Fact]:
        """Clients need not report anything."""
        return frozenset()

    @property
    def transforms(self) -> tuple[UpdateTransform, ...]:
        """The method adds no transforms."""
        return ()

    @property
    def needs_labels(self) -> bool:
        """The local rule does not read answer counts."""
        return False

    def init(self, weights: Weights, frozen: Weights) -> ServerState:
        """Start from the initial weights, without further state."""
        return ServerState(weights)

    def broadcast(self, state: ServerState) -> Broadcast:
        """Send the global weights, the updates merged into the frozen weights, and the population."""
        step = state.slots.get(BASE_STEP, {})
        return Broadcast(state.round_num, state.weights, base=state.base, base_step=step, population=state.population)

    def uploads(self, round_num: int, name: str) -> bool:
        """Upload every tensor."""
        return True

    def downloads(self, name: str) -> bool:
        """Download every tensor."""
        return True

    def local_rule(self, broadcast: Broadcast, client: Client) -> LocalRule:
        """Minimize the loss without further terms."""
        return LocalRule()

    def fold(self, state: ServerState, update: ClientUpdate) -> tuple[Slots, float]:
        """Return the update and its extras, weighted by sample count or uniformly."""
        return {UPDATE: update.update, **update.extras}, 1.0 if self.uniform_weights else update.weight

    def server_step(self, state: ServerState, aggregate: Aggregate) -> ServerState:
        """Add the mean update in float64 and round once to float32."""
        return state.after(W.add(state.weights, aggregate.update))

    def personal(self, state: ServerState, client_state: Slots) -> Weights:
        """Return the global weights: the method trains no personalized models."""
        return state.weights


def client_weights(state: ServerState, update: ClientUpdate) -> Weights:
    """Return a client's weights after training, at its own rank: the weights it received plus its update."""
    return W.add(factors.cut(state.weights, update.rank), update.update)


def mean_of_others(aggregate: Aggregate) -> Weights:
    """Return the weighted mean of those of the members' ``WEIGHTS`` that are not LoRA factors, in float32."""
    mean = W.WeightedMean()
    for member in aggregate.members:
        mean.add(factors.others(member.slots[WEIGHTS]), member.share)
    return {name: tensor.float() for name, tensor in mean.value().items()}


def merge(state: ServerState, gained: Mapping[str, factors.Pair]) -> Slots:
    """Return the slots after products of factors are added to the frozen weights.

    ``BASE_STEP`` keeps the factors in float32, because every client must receive them.
    """
    step = factors.to_float(gained.items())
    return {BASE: factors.accumulated(state.base, step), BASE_STEP: step}


def zeros(weights: Weights) -> Weights:
    """Return zeros in float64 with the shapes of the weights, for sums at the server."""
    return W.zeros_like(weights, torch.float64)
