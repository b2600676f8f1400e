"""Messages of secure aggregation between the server and sites: a message of the protocol with the client and round that it is for."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fedmllm.engine.base import SecureStage
from fedmllm.flower.facts import Facts, Failed
from fedmllm.packing import pack, unpack
from fedmllm.privacy.secagg.messages import DOWN, UP, Message, largest, read, write
from fedmllm.types import ClientFailure

SESSION = "train.session"
"""Flower's type of these messages."""
_ROSTER = 1 << 24
"""Maximum number of characters of the signed list of sites, enough for 40,000 sites."""


class StageFacts(Facts):
    """What a message belongs to.

    Attributes:
        client: the client that it is for.
        run, stage, round_num: the round.
        step: the stage of the session.
        roster: the signed list of sites, in stage ``keys`` only.
    """

    client: str
    run: str = Field(max_length=200)
    stage: str = Field(max_length=200)
    round_num: int = Field(ge=0)
    step: Literal["keys", "shares", "masked", "survivors", "unmask"]
    roster: str = Field("", max_length=_ROSTER)


def write_stage(stage: SecureStage, client: str, roster: str) -> bytes:
    """Return the message of a stage to a client as bytes.

    Args:
        stage: the stage.
        client: the client.
        roster: the signed list of sites. Clients need it once.
    """
    about = stage.round_id
    sent = roster if stage.name == "keys" else ""
    facts = StageFacts.model_validate(
        {"client": client, "run": about.run, "stage": about.stage, "round_num": about.round_num, "step": stage.name, "roster": sent}
    )
    content = torch.frombuffer(bytearray(write(stage.messages[client])), dtype=torch.uint8)
    return pack({"message": {"content": content}}, facts.model_dump())


def read_stage(content: bytes) -> tuple[StageFacts, bytes]:
    """Return what a message belongs to, and the bytes of the protocol's message.

    Raises:
        ValueError: if the content is not such a message.
    """
    groups, values = unpack(content)
    if {kind: list(tensors) for kind, tensors in groups.items()} != {"message": ["content"]}:
        raise ValueError(f"a message of a session has one part, got {sorted(groups)}")
    part = groups["message"]["content"]
    if part.dtype != torch.uint8 or part.dim() != 1:
        raise ValueError(f"a message of a session consists of bytes, got {part.dtype} of shape {tuple(part.shape)}")
    return StageFacts.model_validate(values), part.numpy().tobytes()


def read_down(step: str, content: bytes, num_sites: int) -> Message:
    """Read the server's message of a stage at a site.

    Raises:
        ValueError: if it is another message, or larger than one for ``num_sites`` sites.
    """
    return read(DOWN[step], content, largest(num_sites, 0))


def read_up(content: bytes, client: str, stage: SecureStage) -> Message | ClientFailure:
    """Read a client's answer at the server. An answer that cannot be read becomes a failure."""
    try:
        return read(UP[stage.name], content, stage.largest)
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        return ClientFailure(client, _failure(content) or f"the answer cannot be read: {error}")


def _failure(content: bytes) -> str:
    """Return the reason in a failure message; empty if it is none."""
    try:
        return Failed.model_validate(unpack(content)[1]).failure
    except ValueError:
        return ""
