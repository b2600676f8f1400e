"""A whole session: the sum, and clients that leave it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg.messages import STAGES, MaskedVector, Message, Vector, largest, read, write
from fedmllm.privacy.secagg.policy import Policy
from fedmllm.privacy.secagg.server import Dropped
from fedmllm.privacy.secagg.simulate import secure_sum
from secure_sessions import Session, plain_sum, vectors


def over_the_wire(message: Message) -> Message:
    limit = largest(10, len(message.vector) if isinstance(message, MaskedVector) else 0)
    return read(type(message), write(message), limit)


drops = st.fixed_dictionaries({stage: st.integers(0, 2) for stage in STAGES})


@settings(max_examples=40)
@given(st.integers(2, 9), st.integers(0, 40), drops, st.integers(2, 5), st.randoms())
def test_the_sum_is_that_of_the_plain_vectors_or_there_is_none(
    count: int, length: int, leaving: dict[str, int], min_clients: int, draw: Any
) -> None:
    given_, left, drop = vectors(count, length), [chr(97 + i) for i in range(count)], {}
    after = {}
    for stage in STAGES:
        drop[stage] = draw.sample(left, min(leaving[stage], len(left)))
        left = [name for name in left if name not in drop[stage]]
        after[stage] = left
    t = 2 * len(after["keys"]) // 3 + 1
    enough = all(len(after[stage]) >= max(t, min_clients if stage in STAGES[:3] else 0) for stage in STAGES)
    if not enough or len(after["keys"]) == 0:
        with pytest.raises(FederationError, match=r"secure aggregation needs at least \d clients after stage"):
            secure_sum(given_, length, Policy(min_clients), drop=drop, carry=over_the_wire)
        return
    found = secure_sum(given_, length, Policy(min_clients), drop=drop, carry=over_the_wire)
    assert found.survivors == tuple(after["masked"])
    assert found.vector.dtype == np.uint32
    assert (found.vector == plain_sum(given_, found.survivors)).all()


@pytest.mark.parametrize("stage", STAGES)
def test_three_clients_tolerate_no_dropout_and_four_tolerate_one(stage: str) -> None:
    four = vectors(4, 30)
    found = secure_sum(four, 30, drop={stage: {"b"}})
    expected = "acd" if stage in STAGES[:3] else "abcd"
    assert found.survivors == tuple(expected)
    assert (found.vector == plain_sum(four, expected)).all()
    three = vectors(3, 30)
    assert (secure_sum(three, 30).vector == plain_sum(three, "abc")).all()
    with pytest.raises(
        FederationError, match=rf"at least 3 clients after stage {stage}, but 2 are left.*\n  - b \(stage {stage}\): no answer"
    ):
        secure_sum(three, 30, Policy(3), drop={stage: {"b"}})
    with pytest.raises(FederationError, match="but 2 are left"):
        secure_sum(four, 30, Policy(3), drop={stage: {"b", "c"}})


def test_long_vectors_in_several_chunks() -> None:
    given_ = vectors(4, 200_001)
    found = secure_sum(given_, 200_001, drop={"masked": {"c"}})
    assert (found.vector == given_["a"] + given_["b"] + given_["d"]).all()


def test_the_sum_needs_min_clients_and_its_unmasking_the_threshold() -> None:
    given_ = vectors(7, 30)
    found = secure_sum(given_, 30, Policy(6), drop={"masked": {"a"}, "survivors": {"b"}})
    assert found.survivors == tuple("bcdefg")
    assert (found.vector == plain_sum(given_, "bcdefg")).all()
    with pytest.raises(FederationError, match="at least 7 clients after stage masked"):
        secure_sum(given_, 30, Policy(7), drop={"masked": {"a"}})


class Lazy(Mapping[str, Vector]):
    """Vectors that exist only while they are read."""

    def __init__(self, count: int) -> None:
        self.names, self.read = [chr(97 + i) for i in range(count)], list[str]()

    def __getitem__(self, name: str) -> Vector:
        self.read.append(name)
        return np.full(10, ord(name), np.uint32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def test_each_vector_is_read_once_when_it_is_masked() -> None:
    lazy = Lazy(5)
    assert (secure_sum(lazy, 10, drop={"shares": {"b"}}).vector == sum(map(ord, "acde"))).all()
    assert lazy.read == ["a", "c", "d", "e"]


def test_vectors_are_not_changed() -> None:
    given_ = vectors(3, 30)
    before = {name: vector.copy() for name, vector in given_.items()}
    secure_sum(given_, 30)
    assert all((given_[name] == before[name]).all() for name in before)


def lose(*names: str) -> Any:
    return lambda name, answer: None if name in names else answer


def test_the_server_names_who_left_and_where() -> None:
    session = Session(8)
    found = session.run({"keys": lose("a"), "masked": lose("c"), "survivors": lose("d")})
    assert found.survivors == ("b", "d", "e", "f", "g", "h")
    assert session.server.dropped == [
        Dropped("a", "keys", "no answer"),
        Dropped("c", "masked", "no answer"),
        Dropped("d", "survivors", "no answer"),
    ]
    assert (found.vector == plain_sum(session.vectors, found.survivors)).all()


def test_a_vector_that_arrives_late_stays_out_of_the_sum() -> None:
    session = Session(4)
    late = {}
    session.up("masked", session.down("masked"), lambda name, answer: None if name == "d" and late.update(d=answer) is None else answer)
    messages = session.server.begin("survivors")
    session.server.receive("d", late["d"])
    session.up("survivors", messages)
    session.up("unmask", session.server.begin("unmask"))
    found = session.server.total()
    assert found.survivors == ("a", "b", "c")
    assert (found.vector == plain_sum(session.vectors, "abc")).all()


def test_an_answer_counts_once() -> None:
    session = Session(3)
    twice: Any = lambda name, answer: session.server.receive(name, answer) or answer  # noqa: E731
    found = session.run(dict.fromkeys(STAGES, twice))
    assert (found.vector == plain_sum(session.vectors, "abc")).all()
    assert session.server.dropped == []


def change(client: str, **values: Any) -> Any:
    return lambda name, answer: dataclasses.replace(answer, **values) if name == client else answer


WRONG = {
    "another session": ("keys", change("b", session=bytes(16)), "belongs to another session"),
    "another type": ("masked", lambda name, answer: object() if name == "b" else answer, "the answer is object, expected MaskedVector"),
    "a changed mask key": ("keys", change("b", mask_key=bytes(range(32))), "its site did not sign its keys"),
    "a changed signature": ("keys", change("b", signature=bytes(102)), "its site did not sign its keys"),
    "shares for others": ("shares", change("b", sealed={}), r"its shares are for \[\], expected \['a', 'c', 'd'\]"),
    "a long vector": ("masked", change("b", vector=np.zeros(51, np.uint32)), r"uint32 of shape \(51,\), expected uint32 of shape \(50,\)"),
    "a vector of int32": ("masked", change("b", vector=np.zeros(50, np.int32)), "its vector is int32"),
    "a wrong endorsement": ("survivors", change("b", signature=bytes(102)), "its signature over the survivors is not valid"),
    "seeds of others": ("unmask", change("b", seeds={}), r"its shares are for \[\]"),
    "a mask key of a survivor": ("unmask", change("b", mask_keys={"a": bytes(66)}), r"its shares are for \['a'\], expected \[\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_invalid_answer_drops_its_client_and_no_other(case: str) -> None:
    stage, wrong, reason = WRONG[case]
    session = Session(4)
    found = session.run({stage: wrong})
    assert found.survivors == tuple("acd" if stage in STAGES[:3] else "abcd")
    assert (found.vector == plain_sum(session.vectors, found.survivors)).all()
    assert [(row.client, row.stage) for row in session.server.dropped] == [("b", stage)]
    assert re.search(reason, session.server.dropped[0].reason)


def test_a_client_that_is_no_site_is_dropped() -> None:
    session = Session(4)
    del session.sites["d"]
    assert session.run().survivors == ("a", "b", "c")
    assert session.server.dropped == [Dropped("d", "keys", "it is not in the list of sites")]


def test_wrong_shares_end_the_session_and_name_their_owner() -> None:
    session = Session(4)
    revealed = {name: bytes(66) for name in "abcd"}
    with pytest.raises(
        FederationError, match="shares do not give the seed of a back, so a or a client that revealed one sent wrong shares"
    ):
        session.run({"unmask": change("b", seeds=revealed)})
    session = Session(4)
    with pytest.raises(FederationError, match="shares do not give the mask key of d back"):
        session.run({"masked": lose("d"), "unmask": change("b", mask_keys={"d": bytes(66)})})
    session = Session(4)
    with pytest.raises(FederationError, match="shares do not give the seed of b back"):
        session.run({"shares": change("b", commitment=bytes(32))})


def test_stages_run_once_and_in_order() -> None:
    session = Session(3)
    with pytest.raises(FederationError, match="shares does not follow the start"):
        session.server.begin("shares")
    with pytest.raises(FederationError, match="the total does not follow the start"):
        session.server.total()
    session.run()
    with pytest.raises(FederationError, match="the total does not follow total"):
        session.server.total()
    with pytest.raises(FederationError, match="keys does not follow total"):
        session.server.begin("keys")


def test_reasons_of_failed_clients_are_in_the_error() -> None:
    session = Session(3)
    messages = session.down("masked")
    session.server.drop("b", "out of memory")
    session.up("masked", {name: messages[name] for name in "ac"})
    with pytest.raises(
        FederationError, match=r"round 3 of stage federated of run run: .* the round is skipped; .*\n  - b \(stage masked\): out of memory"
    ):
        session.server.begin("survivors")
