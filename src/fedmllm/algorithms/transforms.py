"""Update transforms: operations on an update between the client's training and the server's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fedmllm.algorithms.base import Algorithm
from fedmllm.algorithms.state import Aggregate, ServerState
from fedmllm.errors import ConfigError
from fedmllm.types import Broadcast, ClientUpdate, Slots, Weights

Packed = Sequence[Tensor]
"""A tensor in its encoded form. The shape is not included, because the receiver knows it."""


class Codec(Protocol):
    """An encoding of tensors for the upload."""

    def pack(self, tensor: Tensor) -> Packed:
        """Encode a float32 tensor. Non-finite entries stay non-finite, so that the server can reject them."""
        ...

    def unpack(self, packed: Packed, shape: torch.Size) -> Tensor:
        """Decode a tensor at the server, in float32."""
        ...


@dataclass(frozen=True)
class ClientContext:
    """What a transform knows at the client.

    Attributes:
        client: the client's id.
        algorithm: the method.
        broadcast: what the client received.
        seed: the experiment's seed, from which all random numbers derive.
        ended: the client's weights after training, at its own rank.
        kept: what this transform kept from the client's last accepted update; empty before the first.
    """

    client: str
    algorithm: Algorithm
    broadcast: Broadcast
    seed: int = 0
    ended: Weights = field(default_factory=dict)
    kept: Slots = field(default_factory=dict)


class UpdateTransform:
    """Base class of update transforms. It changes nothing; a transform overrides the hooks that it needs.

    The hooks run in this order:

    1. At the client, after training, ``client`` runs in the order of the chain: ``update <- t_n(... t_1(update))``.
    2. At the server, ``weigh`` runs on the weight of each update as it arrives, in the same order.
    3. At the server, before its step, ``aggregate`` runs on the aggregate in reverse order, so that the last transform applied is the
       first one undone.

    A transform is a frozen dataclass of settings. What it keeps at a client is the second value that ``client`` returns. It is stored
    under ``name`` and passed to the next call only if the server accepted the update.
    """

    name: ClassVar[str]
    """Names the tensors that clients keep for this transform. It must be unique within a chain and contain no slash."""

    @property
    def codec(self) -> Codec | None:
        """The encoding of uploaded tensors; None for no encoding. Only the last transform of a chain may have one."""
        return None

    @property
    def reweighs(self) -> bool:
        """Whether the transform changes the weights of updates."""
        return type(self).weigh is not UpdateTransform.weigh

    def require(self, algorithm: Algorithm, method: str) -> None:
        """Check that the transform may be used with a method and has an effect on it.

        Args:
            algorithm: the method.
            method: the method's name, for the error message.

        Raises:
            ConfigError: if not; the message names both.
        """
        if self.reweighs and algorithm.ignores_weights:
            raise ConfigError(f"{self.name} changes the weights of updates, but {method} ignores these weights; remove one of them")

    def client(self, update: ClientUpdate, context: ClientContext) -> tuple[ClientUpdate, Slots]:
        """Return the transformed update, and the tensors that the client keeps for its next update."""
        return update, {}

    def weigh(self, weight: float, update: ClientUpdate, state: ServerState) -> float:
        """Return the update's weight, given the weight from the method and from earlier transforms."""
        return weight

    def aggregate(self, aggregate: Aggregate, state: ServerState) -> Aggregate:
        """Return the aggregate for the server's step. ``state`` is the server's state before that step."""
        return aggregate


@dataclass(frozen=True)
class Chain:
    """Update transforms in the order in which they apply at a client. An empty chain leaves updates unchanged."""

    transforms: tuple[UpdateTransform, ...] = ()

    @property
    def codec(self) -> Codec | None:
        """The encoding of uploaded tensors; None for plain float32."""
        return self.transforms[-1].codec if self.transforms else None

    def client(self, update: ClientUpdate, context: ClientContext) -> tuple[ClientUpdate, Slots]:
        """Return the update to send, and the tensors that the client keeps, named ``transform.slot``."""
        keeps: dict[str, Weights] = {}
        for transform in self.transforms:
            prefix = f"{transform.name}."
            own = {name.removeprefix(prefix): slot for name, slot in context.kept.items() if name.startswith(prefix)}
            update, kept = transform.client(update, replace(context, kept=own))
            keeps |= {prefix + name: slot for name, slot in kept.items()}
        return update, keeps

    def weigh(self, weight: float, update: ClientUpdate, state: ServerState) -> float:
        """Return the update's weight after all transforms."""
        for transform in self.transforms:
            weight = transform.weigh(weight, update, state)
        return weight

    def aggregate(self, aggregate: Aggregate, state: ServerState) -> Aggregate:
        """Return the aggregate for the server's step after all transforms."""
        for transform in reversed(self.transforms):
            aggregate = transform.aggregate(aggregate, state)
        return aggregate
