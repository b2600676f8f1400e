from __future__ import annotations

import pytest

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg.messages import PublicKeys
from fedmllm.privacy.secagg.own_secrets import OwnSecrets, commitment
from fedmllm.privacy.secagg.shamir import combine


def clients(names: str) -> dict[str, OwnSecrets]:
    found = {name: OwnSecrets(name) for name in names}
    keys = {name: PublicKeys(bytes(16), *secrets.public, bytes(8)) for name, secrets in found.items()}
    sealed = {name: secrets.split(b"context", keys) for name, secrets in found.items()}
    for receiver, secrets in found.items():
        for sender in sealed.keys() - {receiver}:
            secrets.open(sender, sealed[sender][receiver])
    return found


def test_revealed_shares_give_a_seed_or_a_mask_key_back() -> None:
    found = clients("abcd")
    seeds, keys = zip(*(found[name].reveal("abc", "d") for name in "abc"), strict=True)
    for name in "abc":
        assert commitment(combine({point: shares[name] for point, shares in enumerate(seeds, 1)})) == found[name].commitment
    mask_key = combine({point: shares["d"] for point, shares in enumerate(keys, 1)})
    assert len(mask_key) == 32
    assert commitment(mask_key) != found["d"].commitment


def test_shares_are_forgotten_once_they_are_revealed() -> None:
    secrets = clients("abc")["a"]
    secrets.reveal("abc", "")
    for survivors, others in (("a", ""), ("", "a"), ("", "b")):
        with pytest.raises(KeyError):
            secrets.reveal(survivors, others)


def test_masks_of_all_clients_leave_their_own_only() -> None:
    found = clients("abc")
    masks = [mask for name in "abc" for mask in found[name].masks(set("abc") - {name})]
    assert len([mask for mask in masks if mask.inverse() not in masks]) == 3
    assert len(set(masks)) == 9


def test_changed_shares_name_their_sender() -> None:
    found = clients("abc")
    with pytest.raises(FederationError, match=r"the shares of b for a cannot be opened: .*; exclude that site if it happens again"):
        found["a"].open("b", bytes(148))
