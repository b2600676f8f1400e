"""The signed list of sites: the federation's authority vouches for each site's public key, so that a server cannot invent sites.

The file is JSON: ``{"sites": {NAME: public key in OpenSSH's format, ...}, "signature": hexadecimal}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmllm.errors import FederationError
from fedmllm.privacy.secagg import statements as S
from fedmllm.privacy.secagg.messages import Name, Signature


class _Roster(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, val_json_bytes="hex", ser_json_bytes="hex")

    sites: dict[Name, Annotated[str, Field(max_length=1000)]]
    signature: Signature


def sign_roster(authority: ec.EllipticCurvePrivateKey, sites: Mapping[str, S.SitePublicKey]) -> bytes:
    """Return the signed list of sites.

    Args:
        authority: the authority's private key (``ca.key``).
        sites: public keys by site.

    Raises:
        FederationError: if two sites have the same key.
    """
    lines = {name: sites[name].public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for name in sorted(sites)}
    _require_distinct(lines)
    return json.dumps({"sites": lines, "signature": S.signed(authority, _statement(lines)).hex()}, indent=2).encode() + b"\n"


def verify_roster(content: bytes, authority: x509.Certificate | ec.EllipticCurvePublicKey) -> dict[str, S.SitePublicKey]:
    """Return the public keys of the sites in a signed list.

    Args:
        content: the list.
        authority: the authority's certificate (``ca.crt``) or public key, which the site holds itself.

    Raises:
        FederationError: if the list was not signed by the authority, or contains a key that is not on P-384 or occurs twice.
    """
    key = authority.public_key() if isinstance(authority, x509.Certificate) else authority
    try:
        roster = _Roster.model_validate_json(content)
    except ValidationError as error:
        raise FederationError(
            f"not a signed list of sites ({error.error_count()} errors); copy it again from where the sites were created"
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not S.is_signed(key, roster.signature, _statement(roster.sites)):
        raise FederationError(
            "the list of sites is not signed by the authority whose ca.crt this site holds; someone changed it, or it is of another federation"
        )
    _require_distinct(roster.sites)
    return {name: _key(name, line) for name, line in roster.sites.items()}


def _key(name: str, line: str) -> S.SitePublicKey:
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FederationError(f"the public key of {name} in the list of sites is not an OpenSSH key on P-384; create the site's key again")
    return key


def _require_distinct(lines: Mapping[str, str]) -> None:
    """Check that no key occurs twice: a site with two names would count as two clients."""
    owners: dict[str, str] = {}
    for name, line in lines.items():
        if (other := owners.setdefault(" ".join(line.split()[:2]), name)) != name:
            raise FederationError(f"sites must have different keys, but {other} and {name} have the same; create one of them again")


def _statement(lines: Mapping[str, str]) -> bytes:
    return S.statement("roster", *(value for name in sorted(lines) for value in (name, lines[name])))
