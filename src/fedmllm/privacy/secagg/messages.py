"""The messages of the protocol, and their strict byte format. Every field has a fixed size or a limit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as checked

from fedmllm.packing import pack, unpack

STAGES = ("keys", "shares", "masked", "survivors", "unmask")
"""The stages of a session, in order."""
Vector = NDArray[np.uint32]
"""Integers modulo 2^32, of shape (length,)."""

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, ser_json_bytes="hex", val_json_bytes="hex")
Session = Annotated[bytes, Field(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32)]
Signature = Annotated[bytes, Field(min_length=8, max_length=128)]
Share = Annotated[bytes, Field(min_length=66, max_length=66)]
Sealed = Annotated[bytes, Field(min_length=148, max_length=148)]
"""Two shares and a tag of 16 bytes."""
Name = Annotated[str, Field(min_length=1, max_length=64)]
Weight = Annotated[float, Field(ge=0, le=1)]


@checked(frozen=True, config=_STRICT)
class RoundId:
    """What a client masks at most one vector for.

    Attributes:
        run: the run's id.
        stage: the stage of the run.
        round_num: the round, counted from 0.
    """

    run: Annotated[str, Field(min_length=1, max_length=200)]
    stage: Annotated[str, Field(min_length=1, max_length=200)]
    round_num: Annotated[int, Field(ge=0)]

    def __str__(self) -> str:
        return f"round {self.round_num} of stage {self.stage} of run {self.run}"


@checked(frozen=True, config=_STRICT)
class Opening:
    """The server opens a session for a round."""

    session: Session
    round_id: RoundId


@checked(frozen=True, config=_STRICT)
class PublicKeys:
    """A client's X25519 keys of this session: for masks, and for sealing shares. The site's key signs them."""

    session: Session
    mask_key: Bytes32
    share_key: Bytes32
    signature: Signature


@checked(frozen=True, config=_STRICT)
class Peers:
    """The public keys of all clients of the session, the receiver included, and the number t of shares that give a secret back."""

    session: Session
    keys: dict[Name, PublicKeys]
    threshold: Annotated[int, Field(ge=1)]


@checked(frozen=True, config=_STRICT)
class SealedShares:
    """A client's shares, encrypted for each peer. The commitment is the SHA-256 digest by which the server recognizes the client's seed."""

    session: Session
    sealed: dict[Name, Sealed]
    commitment: Bytes32


@checked(frozen=True, config=_STRICT)
class Inbox:
    """The sealed shares for one client by sender, and the weights of the senders and of the receiver in the sum, which is at most 1."""

    session: Session
    sealed: dict[Name, Sealed]
    weights: dict[Name, Weight]


@dataclass(frozen=True, eq=False)
class MaskedVector:
    """A client's masked vector."""

    session: bytes
    vector: Vector


@checked(frozen=True, config=_STRICT)
class Survivors:
    """The clients whose masked vectors are in the sum."""

    session: Session
    names: tuple[Name, ...]


@checked(frozen=True, config=_STRICT)
class Endorsement:
    """A client's signature over the survivors and over everything that clients must agree on."""

    session: Session
    signature: Signature


@checked(frozen=True, config=_STRICT)
class Endorsements:
    """Signatures of the survivors, by client."""

    session: Session
    signatures: dict[Name, Signature]


@checked(frozen=True, config=_STRICT)
class Revealed:
    """One share of each client: of its seed if it is in the sum, of its mask key if it is not."""

    session: Session
    seeds: dict[Name, Share]
    mask_keys: dict[Name, Share]


Plain = Opening | PublicKeys | Peers | SealedShares | Inbox | Survivors | Endorsement | Endorsements | Revealed
Message = Plain | MaskedVector
Kind = TypeVar("Kind", bound=Message)

DOWN: dict[str, type[Message]] = {"keys": Opening, "shares": Peers, "masked": Inbox, "survivors": Survivors, "unmask": Endorsements}
"""What the server sends, by stage."""
UP: dict[str, type[Message]] = {
    "keys": PublicKeys,
    "shares": SealedShares,
    "masked": MaskedVector,
    "survivors": Endorsement,
    "unmask": Revealed,
}
"""What a client answers, by stage."""


def largest(num_clients: int, length: int) -> int:
    """Return the maximum size of a message in bytes.

    Args:
        num_clients: the number of clients invited to the session.
        length: the length of a vector, for ``MaskedVector``; 0 for all other messages.
    """
    return 4096 * (num_clients + 1) + 4 * length


def write(message: Message) -> bytes:
    """Return a message as bytes."""
    name = type(message).__name__
    if isinstance(message, MaskedVector):
        # PyTorch's uint32 is younger than its int32; the bits are the same.
        vector = torch.from_numpy(message.vector.view(np.int32))
        return pack({"masked": {"vector": vector}}, {"message": name, "values": {"session": message.session.hex()}})
    values = TypeAdapter[Any](type(message)).dump_python(message, mode="json")
    return pack({}, {"message": name, "values": values})


def read(kind: type[Kind], content: bytes, limit: int) -> Kind:
    """Read a message.

    Args:
        kind: the expected message.
        content: its bytes.
        limit: its maximum size, ``largest``.

    Raises:
        ValueError: if the content is not such a message.
    """
    if len(content) > limit:
        raise ValueError(f"the message has {len(content):,} bytes, expected at most {limit:,}")
    groups, facts = unpack(content)
    if facts.keys() != {"message", "values"} or facts["message"] != kind.__name__:
        raise ValueError(f"the message is {facts.get('message')!r}, expected {kind.__name__!r}")
    if kind is MaskedVector:
        return _masked(groups, facts["values"])  # type: ignore[return-value]
    if groups:
        raise ValueError(f"the message has unexpected tensors {sorted(groups)}")
    # Only JSON input makes pydantic read bytes from hexadecimal digits.
    return TypeAdapter[Kind](kind).validate_json(json.dumps(facts["values"]))


def _masked(groups: dict[str, dict[str, torch.Tensor]], values: Any) -> MaskedVector:
    session = TypeAdapter(dict[str, Session], config=_STRICT).validate_json(json.dumps(values))
    if session.keys() != {"session"} or {kind: list(tensors) for kind, tensors in groups.items()} != {"masked": ["vector"]}:
        raise ValueError("a masked vector has a session and one tensor")
    tensor = groups["masked"]["vector"]
    if tensor.dtype != torch.int32 or tensor.dim() != 1:
        raise ValueError(f"a masked vector is an int32 tensor of one dimension, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return MaskedVector(session["session"], tensor.numpy().view(np.uint32))
