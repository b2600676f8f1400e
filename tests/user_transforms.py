"""Update transforms as a user writes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fedmllm import weights as W
from fedmllm.algorithms import (
    Aggregate,
    ClientContext,
    ServerState,
    UpdateTransform,
)
from fedmllm.types import ClientUpdate, Slots


@dataclass(frozen=True)
class Clipped(UpdateTransform):
    """Bounds the update's norm and adds what was cut off to the next update. A user's file needs no more than this."""

    norm: float
    name = "clipped"

    def client(self, update: ClientUpdate, context: ClientContext) -> tuple[ClientUpdate, Slots]:
        whole = W.add(update.update, context.kept.get("rest", {}))
        sent = {name: tensor * min(1.0, self.norm / max(W.norm(whole), 1e-12)) for name, tensor in whole.items()}
        return replace(update, update=sent), {"rest": W.subtract(whole, sent)}

    def aggregate(self, aggregate: Aggregate, state: ServerState) -> Aggregate:
        return replace(aggregate, mean={**aggregate.mean, "update": {name: 2 * t for name, t in aggregate.mean["update"].items()}})


@dataclass(frozen=True)
class Shifted(UpdateTransform):
    """Adds a number to every entry, at clients and at the server, and to the weight of an update."""

    number: float
    name = "shifted"

    def client(self, update: ClientUpdate, context: ClientContext) -> tuple[ClientUpdate, Slots]:
        shifted = {name: tensor + self.number for name, tensor in update.update.items()}
        return replace(update, update=shifted), {"count": {"n": context.kept.get("count", {"n": torch.zeros(1)})["n"] + 1}}

    def weigh(self, weight: float, update: ClientUpdate, state: ServerState) -> float:
        return weight + self.number

    def aggregate(self, aggregate: Aggregate, state: ServerState) -> Aggregate:
        return replace(aggregate, mean={"update": {name: t + self.number for name, t in aggregate.mean["update"].items()}})
