from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg import statements as S
from fedmllm.privacy.secagg.roster import sign_roster, verify_roster
from fedmllm.sites.keys import init
from secure_sessions import KEYS

SITES = {name: key.public_key() for name, key in zip("abc", KEYS, strict=False)}
AUTHORITY = ec.generate_private_key(ec.SECP384R1())


def line(key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def changed(content: bytes, **values: object) -> bytes:
    return json.dumps({**json.loads(content), **values}).encode()


def test_the_keys_of_a_federation_are_signed_and_verified(tmp_path: Path) -> None:
    init(tmp_path / "f", "127.0.0.1:8000", ["north", "south"])
    authority = load_pem_private_key((tmp_path / "f" / "authority" / "ca.key").read_bytes(), None)
    assert isinstance(authority, ec.EllipticCurvePrivateKey)
    public = {name: load_ssh_public_key((tmp_path / "f" / "server" / f"{name}.pub").read_bytes()) for name in ("north", "south")}
    content = sign_roster(authority, public)  # type: ignore[arg-type]
    certificate = x509.load_pem_x509_certificate((tmp_path / "f" / "sites" / "north" / "ca.crt").read_bytes())
    assert verify_roster(content, certificate) == public
    own = load_ssh_private_key((tmp_path / "f" / "sites" / "south" / "site.key").read_bytes(), None)
    assert own.public_key() == public["south"]  # type: ignore[union-attr]


def test_a_forged_site_is_refused() -> None:
    content = sign_roster(AUTHORITY, SITES)
    sites = json.loads(content)["sites"]
    assert verify_roster(content, AUTHORITY.public_key()) == SITES
    for forged in (
        {**sites, "z": line(KEYS[9].public_key())},
        {**sites, "a": line(KEYS[9].public_key())},
        {**sites, "a": sites["b"], "b": sites["a"]},
        {name: sites[name] for name in "ab"},
        {"a": sites["a"], "b": sites["b"], "d": sites["c"]},
    ):
        with pytest.raises(FederationError, match=r"not signed by the authority whose ca\.crt this site holds"):
            verify_roster(changed(content, sites=forged), AUTHORITY.public_key())


def test_another_authority_is_refused() -> None:
    content = sign_roster(KEYS[8], SITES)
    with pytest.raises(FederationError, match="not signed by the authority"):
        verify_roster(content, AUTHORITY.public_key())


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"sites": {}}', b'{"sites": {"a": 1}, "signature": "00"}', b'{"sites": {}, "signature": "xy"}']
)
def test_what_is_no_list_is_refused(content: bytes) -> None:
    with pytest.raises(FederationError, match=r"not a signed list of sites \(\d error"):
        verify_roster(content, AUTHORITY.public_key())
    with pytest.raises(FederationError, match="not a signed list"):
        verify_roster(changed(sign_roster(AUTHORITY, SITES), extra=1), AUTHORITY.public_key())


def test_a_key_occurs_once_and_is_on_the_right_curve() -> None:
    with pytest.raises(FederationError, match="a and d have the same"):
        sign_roster(AUTHORITY, {**SITES, "d": SITES["a"]})
    lines = {"a": line(SITES["a"]), "d": line(SITES["a"]) + " with a comment"}
    signature = S.signed(AUTHORITY, S.statement("roster", "a", lines["a"], "d", lines["d"]))
    with pytest.raises(FederationError, match="a and d have the same"):
        verify_roster(json.dumps({"sites": lines, "signature": signature.hex()}).encode(), AUTHORITY.public_key())
    for wrong in (ec.generate_private_key(ec.SECP256R1()).public_key(), ed25519.Ed25519PrivateKey.generate().public_key()):
        content = sign_roster(AUTHORITY, {**SITES, "d": wrong})  # type: ignore[dict-item]
        with pytest.raises(FederationError, match="public key of d in the list of sites is not an OpenSSH key on P-384"):
            verify_roster(content, AUTHORITY.public_key())
