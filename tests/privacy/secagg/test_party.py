"""What a client refuses. The server and the other clients are malicious in these tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg import statements as S
from fedmllm.privacy.secagg.messages import Endorsements, Inbox, Opening, Peers, PublicKeys, RoundId, Survivors
from fedmllm.privacy.secagg.party import Party
from fedmllm.privacy.secagg.policy import Policy, threshold
from fedmllm.privacy.secagg.simulate import UsedInMemory
from fedmllm.privacy.secagg.used import UsedRounds
from secure_sessions import KEYS, ROUND, Session


def refused(session: Session, stage: str, message: Any, match: str, name: str = "a") -> None:
    """Check that a client refuses a message, and everything after it."""
    with pytest.raises(FederationError, match=match):
        session.answer(name, stage, message)
    with pytest.raises(FederationError, match="expected 'none, because the session has ended'"):
        session.answer(name, stage, message)


def with_keys(message: Peers, **changed: PublicKeys | None) -> Peers:
    keys = {**message.keys, **changed}
    found = {name: value for name, value in keys.items() if value is not None}
    return Peers(message.session, found, threshold(len(found)))


def signed_by(key: S.SiteKey, name: str, session: bytes, round_id: RoundId = ROUND, mask_key: bytes = bytes(range(32))) -> PublicKeys:
    signature = S.signed(key, S.keys_statement(round_id, session, b"", name, mask_key, mask_key))
    return PublicKeys(session, mask_key, mask_key, signature)


def test_a_session_for_another_round_is_refused() -> None:
    session = Session()
    opening = Opening(bytes(16), RoundId("run", "federated", 4))
    refused(session, "keys", opening, "is for round 4 of stage federated of run run, but a trained for round 3")


@pytest.mark.parametrize("field", ["mask_key", "share_key", "signature"])
def test_a_changed_key_is_refused(field: str) -> None:
    session = Session()
    peers = session.down("shares")["a"]
    changed = bytes([getattr(peers.keys["c"], field)[0] ^ 1]) + getattr(peers.keys["c"], field)[1:]
    message = with_keys(peers, c=dataclasses.replace(peers.keys["c"], **{field: changed}))
    refused(session, "shares", message, "the keys of c are not signed by its site")


def test_a_site_that_is_not_in_the_signed_list_is_refused() -> None:
    session = Session()
    peers = session.down("shares")["a"]
    invented = ec.generate_private_key(ec.SECP384R1())
    refused(session, "shares", with_keys(peers, z=signed_by(invented, "z", peers.session)), "z is not in the signed list of sites")


def test_the_name_of_a_site_with_another_key_is_refused() -> None:
    session = Session()
    peers = session.down("shares")["a"]
    refused(session, "shares", with_keys(peers, b=signed_by(KEYS[9], "b", peers.session)), "the keys of b are not signed by its site")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda session: signed_by(KEYS[1], "b", session, RoundId("run", "federated", 2)),
        lambda session: signed_by(KEYS[1], "b", session, RoundId("another", "federated", 3)),
        lambda session: signed_by(KEYS[1], "b", session, RoundId("run", "warmup", 3)),
        lambda session: signed_by(KEYS[1], "b", bytes(16)),
        lambda session: dataclasses.replace(signed_by(KEYS[1], "b", bytes(16)), session=session),
        lambda session: signed_by(KEYS[1], "c", session),
    ],
)
def test_keys_of_another_round_session_or_name_are_refused(wrong: Callable[[bytes], PublicKeys]) -> None:
    session = Session()
    peers = session.down("shares")["a"]
    refused(session, "shares", with_keys(peers, b=wrong(peers.session)), "the keys of b are not signed by its site for round 3")


def test_keys_that_make_secrets_predictable_are_refused() -> None:
    session = Session()
    peers = session.down("shares")["a"]
    zero = signed_by(KEYS[1], "b", peers.session, mask_key=bytes(32))
    refused(session, "shares", with_keys(peers, b=zero), "b sent a key that makes secrets predictable")


@pytest.mark.parametrize("change", [{"a": None}, {"a": signed_by(KEYS[0], "a", bytes(16))}])
def test_the_own_keys_must_come_back(change: dict[str, Any]) -> None:
    session = Session()
    refused(session, "shares", with_keys(session.down("shares")["a"], **change), "the server did not return the keys that a sent")


def test_too_few_clients_are_refused_in_every_stage() -> None:
    session = Session(5, Policy(4))
    peers = session.down("shares")["a"]
    refused(session, "shares", with_keys(peers, d=None, e=None), "at least 4 clients .* but 3 sent keys")
    session = Session(5, Policy(4))
    inbox = session.down("masked")["a"]
    few = dataclasses.replace(inbox, sealed={name: inbox.sealed[name] for name in "bc"}, weights=dict.fromkeys("abc", 0.2))
    refused(session, "masked", few, "at least 4 clients .* but 3 sent shares")
    session = Session(5, Policy(4))
    survivors = session.down("survivors")["a"]
    refused(session, "survivors", dataclasses.replace(survivors, names=("a", "b", "c")), "but 3 are left; this round is skipped")


def test_a_low_threshold_is_refused() -> None:
    session = Session()
    message = dataclasses.replace(session.down("shares")["a"], threshold=2)
    refused(session, "shares", message, "the threshold for 4 clients is 3, got 2")


def test_messages_of_another_session_are_refused() -> None:
    for stage in ("shares", "masked", "survivors", "unmask"):
        session, other = Session(), Session()
        session.down(stage)
        refused(session, stage, other.down(stage)["a"], f"a message of stage {stage} belongs to another session")


def test_sealed_shares_of_another_session_are_refused() -> None:
    session, other = Session(), Session()
    inbox, old = session.down("masked")["a"], other.down("masked")["a"]
    message = dataclasses.replace(inbox, sealed={**inbox.sealed, "b": old.sealed["b"]})
    refused(session, "masked", message, "the shares of b for a cannot be opened: it was changed, or sealed for another client or session")


def test_shares_with_another_sender_or_receiver_are_refused() -> None:
    session = Session()
    messages = session.down("masked")
    inbox = messages["a"]
    swapped = {**inbox.sealed, "b": inbox.sealed["c"], "c": inbox.sealed["b"]}
    refused(session, "masked", dataclasses.replace(inbox, sealed=swapped), "the shares of b for a cannot be opened")
    other = {**messages["b"].sealed, "c": messages["d"].sealed["c"]}
    refused(session, "masked", dataclasses.replace(messages["b"], sealed=other), "the shares of c for b cannot be opened", "b")


def test_clients_that_were_shown_different_peers_do_not_share() -> None:
    session = Session(5)
    messages = session.down("shares")
    answers = {name: session.answer(name, "shares", messages[name]) for name in "abcd"}
    answers["e"] = session.answer("e", "shares", with_keys(messages["e"], d=None))
    inbox = {name: answers[name].sealed["a"] for name in "bcde"}
    message = {"session": messages["a"].session, "sealed": inbox, "weights": dict.fromkeys("abcde", 0.2)}
    refused(session, "masked", Inbox(**message), "the shares of e for a cannot be opened")


def test_an_inbox_that_contradicts_itself_is_refused() -> None:
    for change in (
        lambda inbox: {"weights": dict.fromkeys("abc", 0.25)},
        lambda inbox: {"weights": dict.fromkeys("abcde", 0.2)},
        lambda inbox: {"sealed": {**inbox.sealed, "a": bytes(148)}},
        lambda inbox: {"sealed": {**inbox.sealed, "z": bytes(148)}, "weights": {**inbox.weights, "z": 0.0}},
    ):
        session = Session()
        inbox = session.down("masked")["a"]
        refused(session, "masked", dataclasses.replace(inbox, **change(inbox)), "the server's message contradicts itself")


def test_a_sum_of_one_client_is_refused() -> None:
    """Weights of nearly 1 and nearly 0 would show the first client's update."""
    session = Session()
    inbox = session.down("masked")["a"]
    alone = {"a": 0.999, "b": 1e-4, "c": 1e-4, "d": 1e-4}
    refused(session, "masked", dataclasses.replace(inbox, weights=alone), "at most 0.8 of a sum's weight, but a has 0.9997")
    session = Session()
    inbox = session.down("masked")["a"]
    refused(session, "masked", dataclasses.replace(inbox, weights=dict.fromkeys("abcd", 0.3)), "must sum to at most 1, got 1.2")


def test_survivors_among_whom_one_dominates_are_refused() -> None:
    weights = {"a": 0.45, "b": 0.45, "c": 0.03, "d": 0.03, "e": 0.04}
    session = Session(5, weights=weights)
    messages = session.down("survivors")
    refused(session, "survivors", dataclasses.replace(messages["a"], names=("a", "c", "d", "e")), "but a has 0.818182")
    assert session.answer("b", "survivors", messages["b"]).signature


@pytest.mark.parametrize("names", ["bcde", "abcdd", "abcdz", "abcdf"])
def test_impossible_survivors_are_refused(names: str) -> None:
    """Client f sent keys, but no shares. Four of five are enough."""
    session = Session(6)
    peers = session.down("shares")
    session.up("shares", peers, lambda name, answer: answer if name != "f" else None)
    session.up("masked", session.server.begin("masked"))
    message = session.server.begin("survivors")["a"]
    refused(
        session,
        "survivors",
        dataclasses.replace(message, names=tuple(names)),
        "survivors must be distinct clients of the session, a among them",
    )


def test_a_vector_must_be_quantized() -> None:
    for wrong in (np.zeros(5), np.zeros(5, np.int32), np.zeros((5, 1), np.uint32)):
        session = Session()
        session.vectors["a"] = wrong
        refused(session, "masked", session.down("masked")["a"], "a vector must have one dimension of uint32")


def test_two_lists_of_survivors_never_get_enough_signatures() -> None:
    """The server shows half of the clients one list and half another one, to get both secrets of a client."""
    session = Session(6, Policy(2))
    messages = session.down("survivors")
    lists = {name: ("a", "b", "c", "d", "e", "f") if name in "abc" else ("b", "c", "d", "e", "f") for name in "abcdef"}
    signatures = {name: session.answer(name, "survivors", Survivors(messages[name].session, lists[name])).signature for name in "abcdef"}
    for name in "abcdef":
        refused(session, "unmask", Endorsements(messages[name].session, signatures), "5 clients must sign what . signed, but 3 did", name)


def test_weights_that_differ_between_clients_never_get_enough_signatures() -> None:
    session = Session(4)
    messages = session.down("masked")
    messages["a"] = dataclasses.replace(messages["a"], weights={"a": 0.3, "b": 0.2, "c": 0.25, "d": 0.25})
    session.up("masked", messages)
    survivors = session.server.begin("survivors")
    signatures = {name: session.answer(name, "survivors", survivors[name]).signature for name in "abcd"}
    refused(session, "unmask", Endorsements(survivors["a"].session, signatures), "3 clients must sign what a signed, but 1 did")
    assert session.answer("b", "unmask", Endorsements(survivors["b"].session, signatures)).seeds


def test_fewer_signatures_than_the_threshold_are_refused() -> None:
    session = Session(4)
    endorsements = session.down("unmask")["a"]
    few = {name: endorsements.signatures[name] for name in "ab"}
    twice = {**few, "c": endorsements.signatures["b"], "z": endorsements.signatures["b"]}
    refused(session, "unmask", Endorsements(endorsements.session, few), "but 2 did")
    refused(session, "unmask", Endorsements(endorsements.session, twice), "but 2 did", "b")


def test_signatures_of_another_session_are_refused() -> None:
    session, other = Session(4), Session(4)
    message, old = session.down("unmask")["a"], other.down("unmask")["a"]
    refused(session, "unmask", Endorsements(message.session, old.signatures), "but 0 did")


def test_nobody_reveals_both_shares_of_a_client_or_reveals_twice() -> None:
    session = Session(7)
    session.up("masked", session.down("masked"), lambda name, answer: answer if name != "c" else None)
    session.up("survivors", session.server.begin("survivors"))
    messages = session.server.begin("unmask")
    for name in "abdefg":
        found = session.answer(name, "unmask", messages[name])
        assert (set(found.seeds), set(found.mask_keys)) == (set("abdefg"), {"c"})
        with pytest.raises(FederationError, match="stages run once and in order, got 'unmask'"):
            session.answer(name, "unmask", messages[name])
        with pytest.raises(FederationError, match="stages run once and in order, got 'survivors'"):
            session.answer(name, "survivors", Survivors(messages[name].session, tuple("abcdefg")))


@pytest.mark.parametrize("stage", ["shares", "masked", "survivors", "unmask"])
def test_no_stage_is_skipped(stage: str) -> None:
    session = Session()
    message = session.down(stage)["a"]
    fresh = Session()
    with pytest.raises(FederationError, match=f"got '{stage}', expected 'keys'"):
        fresh.answer("a", stage, message)


def test_clients_with_other_terms_refuse_each_other() -> None:
    session = Session(3, terms={"b": b"another clip norm"})
    messages = session.server.begin("keys")
    answers = {name: session.answer(name, "keys", message) for name, message in messages.items()}
    refused(
        session,
        "shares",
        Peers(answers["a"].session, answers, 3),
        "the keys of b are not signed .* or the settings of the two sites differ",
    )


def test_a_round_is_masked_once_even_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "used.jsonl"
    session = Session(used={"a": UsedRounds(path)})
    messages = session.down("masked")
    assert not path.exists()
    session.answer("a", "masked", messages["a"])
    again = Session(used={"a": UsedRounds(path)})
    refused(
        again,
        "keys",
        again.server.begin("keys")["a"],
        "a client masks one vector for each round, and did so for round 3 of stage federated",
    )
    later = Session(round_id=RoundId("run", "federated", 4), used={"a": UsedRounds(path)})
    assert later.run().survivors == tuple("abcd")


def test_of_two_open_sessions_of_a_round_only_one_gets_a_vector(tmp_path: Path) -> None:
    path = tmp_path / "used.jsonl"
    first, second = Session(used={"a": UsedRounds(path)}), Session(used={"a": UsedRounds(path)})
    messages = first.down("masked"), second.down("masked")
    first.answer("a", "masked", messages[0]["a"])
    refused(second, "masked", messages[1]["a"], "a client masks one vector for each round")


def test_a_vector_is_not_masked_if_the_round_cannot_be_recorded(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    session = Session()
    party = Party("a", KEYS[0], session.sites, ROUND, UsedRounds(tmp_path / "folder"), Policy())
    session.parties["a"] = party
    with pytest.raises(IsADirectoryError):
        session.run()
    with pytest.raises(FederationError, match="because the session has ended"):
        party.keys(Opening(bytes(16), ROUND))


def test_simulated_clients_use_a_round_once() -> None:
    used = UsedInMemory()
    used.claim(ROUND)
    with pytest.raises(FederationError, match="masks one vector for each round"):
        used.claim(ROUND)
