"""Update transforms: what happens to an update between a client's training and the server's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fedmllm.algorithms.base import Aggregate, Algorithm, ServerState
from fedmllm.errors import ConfigError
from fedmllm.types import Broadcast, ClientUpdate, Slots, Weights

Packed = Sequence[Tensor]
"""A tensor as it is sent; the receiver knows its shape."""


class Codec(Protocol):
    """A way to write a tensor."""

    def pack(self, tensor: Tensor) -> Packed:
        """What is sent of a float32 tensor. Entries that are not finite stay so, and the server refuses them."""
        ...

    def unpack(self, packed: Packed, shape: torch.Size) -> Tensor:
        """The float32 tensor that the server reads."""
        ...


@dataclass(frozen=True)
class ClientContext:
    """What a transform knows at a client.

    Attributes:
        client: whose update it is.
        algorithm: the method.
        broadcast: what the client received.
        seed: the experiment's; all random numbers derive from it.
        ended: the weights that training ended with, at the client's own rank.
        kept: what this transform kept from the client's last accepted update; empty before the first.
    """

    client: str
    algorithm: Algorithm
    broadcast: Broadcast
    seed: int = 0
    ended: Weights = field(default_factory=dict)
    kept: Slots = field(default_factory=dict)


class UpdateTransform:
    """One link of the chain that an update goes through. This one changes nothing.

    At the client, after training, ``client`` hooks apply in the order of the chain: ``update <- t_n(... t_1(update))``. At the server, ``weigh``
    applies to each update's weight as it arrives, in the same order, and ``aggregate`` to what the updates come to, before the server's
    step, in the opposite order: the last to wrap is the first to unwrap. A transform is a frozen dataclass of settings; what a client
    keeps for it is returned by ``client``, stored under ``name`` and given back only once the server has accepted the update.
    """

    name: ClassVar[str]
    """Names what clients keep for it; one of a kind in a chain, without a slash."""

    @property
    def codec(self) -> Codec | None:
        """How it writes an update's tensors for the way up; None if it does not. Only the last transform of a chain may have one."""
        return None

    @property
    def reweighs(self) -> bool:
        """Whether it changes what updates weigh."""
        return type(self).weigh is not UpdateTransform.weigh

    def require(self, algorithm: Algorithm, method: str) -> None:
        """Refuse a method with which it has no effect, or must not be used.

        Args:
            algorithm: the method.
            method: its name, for the error.

        Raises:
            ConfigError: naming both.
        """
        if self.reweighs and algorithm.ignores_weights:
            raise ConfigError(f"{self.name} changes what updates weigh, but {method} counts clients alike; leave one of them out")

    def client(self, update: ClientUpdate, context: ClientContext) -> tuple[ClientUpdate, Slots]:
        """The update as it goes on, and what the client keeps for the next time."""
        return update, {}

    def weigh(self, weight: float, update: ClientUpdate, state: ServerState) -> float:
        """What an update weighs, from what the method and earlier transforms give it."""
        return weight

    def aggregate(self, aggregate: Aggregate, state: ServerState) -> Aggregate:
        """The aggregate as the server's step sees it; ``state`` is the server's before that step."""
        return aggregate


@dataclass(frozen=True)
class Chain:
    """Update transforms in the order in which they apply at a client; empty for updates as they are."""

    transforms: tuple[UpdateTransform, ...] = ()

    @property
    def codec(self) -> Codec | None:
        """How updates are written for the way up; None for float32 as they are."""
        return self.transforms[-1].codec if self.transforms else None

    def client(self, update: ClientUpdate, context: ClientContext) -> tuple[ClientUpdate, Slots]:
        """The update as it is sent, and what the client keeps, under ``transform.slot``."""
        keeps: dict[str, Weights] = {}
        for transform in self.transforms:
            prefix = f"{transform.name}."
            own = {name.removeprefix(prefix): slot for name, slot in context.kept.items() if name.startswith(prefix)}
            update, kept = transform.client(update, replace(context, kept=own))
            keeps |= {prefix + name: slot for name, slot in kept.items()}
        return update, keeps

    def weigh(self, weight: float, update: ClientUpdate, state: ServerState) -> float:
        """What an update weighs."""
        for transform in self.transforms:
            weight = transform.weigh(weight, update, state)
        return weight

    def aggregate(self, aggregate: Aggregate, state: ServerState) -> Aggregate:
        """The aggregate as the server's step sees it."""
        for transform in reversed(self.transforms):
            aggregate = transform.aggregate(aggregate, state)
        return aggregate
