"""The order in which tensors form one vector, the same at clients and server."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg.statements import Value, digest
from fedmllm.types import Slots, Weights

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Entry:
    """A tensor in a vector."""

    kind: str
    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Tensors by kind and name, one after another.

    Attributes:
        entries: the tensors, sorted by kind and name.
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, slots: Slots) -> Layout:
        """Return the layout of tensors; only their names and shapes count."""
        return cls(tuple(Entry(kind, name, tuple(slots[kind][name].shape)) for kind in sorted(slots) for name in sorted(slots[kind])))

    @property
    def length(self) -> int:
        """The number of values in a vector."""
        return sum(entry.size for entry in self.entries)

    @property
    def digest(self) -> bytes:
        """A digest of the layout, for the terms of a session."""
        parts: list[Value] = []
        for entry in self.entries:
            parts += [entry.kind, entry.name, *entry.shape]
        return digest("layout", *parts)

    def flat(self, slots: Slots) -> Floats:
        """Return the tensors as one vector in float64.

        Raises:
            FederationError: if they have other names or shapes than the layout.
        """
        if (found := Layout.of(slots)) != self:
            wrong = sorted({(entry.kind, entry.name) for entry in set(found.entries) ^ set(self.entries)})[0]
            raise FederationError(
                f"clients in a sum must have the same tensors, but {wrong[0]}/{wrong[1]} is missing, unexpected or of another shape; use the same "
                "LoRA rank and targets at all clients, or pad the tensors with zeros"
            )
        vector = np.empty(self.length)
        for entry, part in zip(self.entries, self._parts(vector), strict=True):
            part[:] = slots[entry.kind][entry.name].detach().to("cpu", torch.float64).reshape(-1).numpy()
        return vector

    def slots(self, vector: Floats) -> dict[str, Weights]:
        """Return a vector's tensors in float64. They share its memory.

        Raises:
            FederationError: if the vector has another length.
        """
        if vector.shape != (self.length,):
            raise FederationError(f"a vector of this layout must have the shape ({self.length},), got {vector.shape}")
        found: dict[str, Weights] = {}
        for entry, part in zip(self.entries, self._parts(vector), strict=True):
            found.setdefault(entry.kind, {})[entry.name] = torch.from_numpy(part).reshape(entry.shape)
        return found

    def _parts(self, vector: Floats) -> list[Floats]:
        return np.split(vector, np.cumsum([entry.size for entry in self.entries])[:-1]) if self.entries else []
