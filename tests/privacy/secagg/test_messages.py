from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from fedmllm.packing import pack, unpack
from fedmllm.privacy.secagg.messages import (
    DOWN,
    STAGES,
    UP,
    Endorsements,
    Inbox,
    MaskedVector,
    Message,
    Opening,
    Peers,
    PublicKeys,
    Revealed,
    RoundId,
    SealedShares,
    largest,
    read,
    write,
)
from secure_sessions import Session

LIMIT = largest(4, 50)


def all_messages() -> list[Message]:
    session, found = Session(4), []
    for stage in STAGES:
        messages = session.server.begin(stage)
        answers = {name: session.answer(name, stage, message) for name, message in messages.items()}
        for name, answer in answers.items():
            session.server.receive(name, answer)
        found += [messages["a"], answers["a"]]
    return found


MESSAGES = all_messages()


def test_every_message_of_a_session_is_read_as_it_was_written() -> None:
    assert [type(message) for message in MESSAGES] == [kind for stage in STAGES for kind in (DOWN[stage], UP[stage])]
    for message in MESSAGES:
        found = read(type(message), write(message), LIMIT)
        if isinstance(found, MaskedVector):
            assert isinstance(message, MaskedVector)
            assert found.session == message.session
            assert found.vector.dtype == np.uint32
            assert (found.vector == message.vector).all()
        else:
            assert found == message


def test_a_message_is_of_one_type() -> None:
    for message in MESSAGES:
        for kind in {*DOWN.values(), *UP.values()} - {type(message)}:
            with pytest.raises(ValueError, match=f"the message is '{type(message).__name__}', expected '{kind.__name__}'"):
                read(kind, write(message), LIMIT)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_cut_extended_and_large_messages_are_refused(message: Message) -> None:
    content = write(message)
    for wrong in (content[:-1], content[:20], b"", content + b"\0"):
        with pytest.raises(ValueError, match=r".+"):
            read(type(message), wrong, LIMIT)
    with pytest.raises(ValueError, match="expected at most"):
        read(type(message), content, len(content) - 1)


def altered(message: Message, **values: Any) -> bytes:
    """Return a message with other plain values."""
    groups, facts = unpack(write(message))
    return pack(groups, {**facts, "values": {**facts["values"], **values}})


WRONG = [
    (MESSAGES[0], {"session": "00" * 15}),
    (MESSAGES[0], {"session": "zz" * 16}),
    (MESSAGES[0], {"session": 5}),
    (MESSAGES[0], {"extra": 1}),
    (MESSAGES[0], {"round_id": {"run": "r", "stage": "s", "round_num": -1}}),
    (MESSAGES[0], {"round_id": {"run": "r", "stage": "s", "round_num": True}}),
    (MESSAGES[0], {"round_id": {"run": "r", "stage": "s", "round_num": 1.0}}),
    (MESSAGES[0], {"round_id": {"run": "", "stage": "s", "round_num": 1}}),
    (MESSAGES[0], {"round_id": {"run": "r", "stage": "s"}}),
    (MESSAGES[1], {"mask_key": "00" * 33}),
    (MESSAGES[1], {"signature": "00" * 129}),
    (MESSAGES[2], {"threshold": 0}),
    (MESSAGES[2], {"keys": {"": {}}}),
    (MESSAGES[2], {"keys": []}),
    (MESSAGES[3], {"sealed": {"b": "00" * 147}}),
    (MESSAGES[3], {"sealed": {"b" * 65: "00" * 148}}),
    (MESSAGES[3], {"commitment": None}),
    (MESSAGES[4], {"weights": {"a": 1.5}}),
    (MESSAGES[4], {"weights": {"a": -0.1}}),
    (MESSAGES[4], {"weights": {"a": "0.5"}}),
    (MESSAGES[5], {"session": "00"}),
    (MESSAGES[5], {"extra": "00" * 16}),
    (MESSAGES[6], {"names": "abc"}),
    (MESSAGES[6], {"names": [1]}),
    (MESSAGES[8], {"signatures": {"a": "00"}}),
    (MESSAGES[9], {"seeds": {"a": "00" * 65}}),
]


@pytest.mark.parametrize(("message", "values"), WRONG, ids=range(len(WRONG)))
def test_values_of_another_type_or_size_are_refused(message: Message, values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        read(type(message), altered(message, **values), LIMIT)


def test_not_a_number_is_no_weight() -> None:
    inbox = MESSAGES[4]
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ValidationError):
            dataclasses.replace(inbox, weights={"a": wrong})  # type: ignore[type-var]
    content = write(inbox).replace(b"0.25", b"NaN ", 1)
    with pytest.raises(ValueError, match=r".+"):
        read(Inbox, content, LIMIT)


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"masked": {}},
        {"masked": {"vector": torch.zeros(5)}},
        {"masked": {"vector": torch.zeros(5, dtype=torch.int64)}},
        {"masked": {"vector": torch.zeros((5, 1), dtype=torch.int32)}},
        {"masked": {"vector": torch.zeros(5, dtype=torch.int32), "other": torch.zeros(1)}},
        {"other": {"vector": torch.zeros(5, dtype=torch.int32)}},
    ],
)
def test_a_masked_vector_is_one_tensor_of_int32(groups: dict[str, dict[str, torch.Tensor]]) -> None:
    facts = {"message": "MaskedVector", "values": {"session": "00" * 16}}
    with pytest.raises(ValueError, match=r"a masked vector (has|is)"):
        read(MaskedVector, pack(groups, facts), LIMIT)


def test_other_messages_have_no_tensors() -> None:
    _, facts = unpack(write(MESSAGES[0]))
    with pytest.raises(ValueError, match=r"unexpected tensors \['x'\]"):
        read(Opening, pack({"x": {"y": torch.zeros(1)}}, facts), LIMIT)
    with pytest.raises(ValueError, match="the message is None, expected 'Opening'"):
        read(Opening, pack({}, {"failure": "out of memory"}), LIMIT)


def test_the_limit_has_room_for_the_longest_names() -> None:
    """Names of 64 characters that JSON writes with twelve each, in all messages that grow with the number of clients."""
    for count in (2, 50):
        names = [chr(0x1F600 + i // 26) * 63 + chr(97 + i % 26) for i in range(count)]
        keys = PublicKeys(bytes(16), bytes(32), bytes(32), bytes(128))
        for message in (
            Peers(bytes(16), dict.fromkeys(names, keys), count),
            SealedShares(bytes(16), dict.fromkeys(names, bytes(148)), bytes(32)),
            Inbox(bytes(16), dict.fromkeys(names, bytes(148)), dict.fromkeys(names, 1 / 3)),
            Endorsements(bytes(16), dict.fromkeys(names, bytes(128))),
            Revealed(bytes(16), dict.fromkeys(names[1:], bytes(66)), {names[0]: bytes(66)}),
            Opening(bytes(16), RoundId("\U0001f600" * 200, "\U0001f600" * 200, 2**60)),
        ):
            content = write(message)
            assert read(type(message), content, largest(count, 0)) == message
    vector = np.zeros(10**6, np.uint32)
    assert len(write(MaskedVector(bytes(16), vector))) <= largest(2, 10**6)


def test_messages_are_small() -> None:
    """4 bytes an entry, and about 0.3 kB for each peer."""
    session = Session(12)
    sizes = {}
    for stage in STAGES:
        messages = session.server.begin(stage)
        session.up(stage, messages, lambda name, answer, stage=stage: sizes.update({stage: len(write(answer))}) or answer)
    assert sum(sizes.values()) - 4 * 50 < 12 * 520 + 5 * 250
