"""What clients tell in plain values: that they are there, how their own models score, and why there is no update."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from fedmllm.packing import pack, unpack
from fedmllm.types import ClientFailure


class Facts(BaseModel):
    """Values of a message: of these names and types, finite, and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Presence(Facts):
    """What a client says of itself before the first round."""

    client: str
    num_samples: int | None = Field(gt=0, lt=2**40)
    """None if it withholds that; so is an empty profile."""
    profile: dict[str, int]
    rank: int | None
    trial: bool
    """Whether it trains its part of the experiment's own split, as a simulated client does, and no data of its own."""


VALIDATION = "validation"
"""What a client's own model is asked in place of a copy of the test split."""


class Scores(Facts):
    """How a client's own model scores where it is."""

    client: str
    round_num: int = Field(ge=0)
    metric: str
    """That of ``score``."""
    metrics: dict[str, float]


class Failed(Facts):
    """Instead of anything else."""

    client: str
    round_num: int = Field(ge=0)
    failure: str = Field(max_length=2000)


Word = TypeVar("Word", Presence, Scores)


def write_word(word: Presence | Scores | ClientFailure, round_num: int = 0) -> bytes:
    """As a message; a failure's reason up to 2,000 characters."""
    told = Failed(client=word.client, round_num=round_num, failure=word.reason[:2000]) if isinstance(word, ClientFailure) else word
    return pack({}, told.model_dump())


def read_word(content: bytes, client: str, kind: type[Word]) -> Word | ClientFailure:
    """A client's word; what cannot be read is a failure."""
    try:
        _, facts = unpack(content)
        if "failure" in facts:
            return ClientFailure(client, Failed.model_validate(facts).failure)
        told = kind.model_validate(facts)
        return told if told.client == client else ClientFailure(client, f"it says that it is {told.client!r}")
    except ValueError as error:
        return ClientFailure(client, f"its word cannot be read: {error}")
