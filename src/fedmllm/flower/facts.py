"""Messages of clients without tensors: presence, scores of personalized models, and failures."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from fedmllm.packing import pack, unpack
from fedmllm.types import ClientFailure


class Facts(BaseModel):
    """The plain values of a message. Unknown names, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Presence(Facts):
    """A client's report about itself before the first round."""

    client: str
    num_samples: int | None = Field(gt=0, lt=2**40)
    """Number of training samples; None if the client withholds it."""
    profile: dict[str, int]
    """Number of samples by modalities; empty if the client withholds it."""
    rank: int | None
    """The client's LoRA rank; None for the experiment's."""
    trial: bool
    """Whether the client trains on its share of the experiment's own split, like a simulated client, and not on data of its own."""


VALIDATION = "validation"
"""The name of the validation split in requests for scores, in place of a copy of the test split."""


class Scores(Facts):
    """Scores of a client's personalized model, computed at the client."""

    client: str
    round_num: int = Field(ge=0)
    metric: str
    """Name of the metric behind ``score``."""
    metrics: dict[str, float]


class Failed(Facts):
    """A failure message, which a client may send in place of any other."""

    client: str
    round_num: int = Field(ge=0)
    failure: str = Field(max_length=2000)


Kind = TypeVar("Kind", Presence, Scores)


def write_message(message: Presence | Scores | ClientFailure, round_num: int = 0) -> bytes:
    """Return a message as bytes. Failure reasons longer than 2,000 characters are truncated."""
    facts = (
        Failed(client=message.client, round_num=round_num, failure=message.reason[:2000]) if isinstance(message, ClientFailure) else message
    )
    return pack({}, facts.model_dump())


def read_message(content: bytes, client: str, kind: type[Kind]) -> Kind | ClientFailure:
    """Read a client's message. A message that cannot be read, or that another client sent, becomes a failure."""
    try:
        _, facts = unpack(content)
        if "failure" in facts:
            return ClientFailure(client, Failed.model_validate(facts).failure)
        message = kind.model_validate(facts)
        return (
            message if message.client == client else ClientFailure(client, f"the message came from {message.client!r}, expected {client!r}")
        )
    except ValueError as error:
        return ClientFailure(client, f"the message cannot be read: {error}")
