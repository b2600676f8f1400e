"""Keys and certificates of a federation: an authority, the server's certificate, and a key pair for each site."""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from fedmllm.errors import ConfigError, RunError
from fedmllm.files import require_folder, write_atomically
from fedmllm.flower.settings import NAME, ROSTER, ServerConfig

DAYS = 825
"""Default validity of certificates in days. Some systems refuse longer ones."""


def init(folder: Path, address: str, sites: Sequence[str], days: int = DAYS) -> None:
    """Create everything that a federation needs to start: ``server/``, ``sites/NAME/``, and the authority's key in ``authority/``.

    Args:
        folder: the folder to create; it must be empty if it exists.
        address: ``host:port`` at which sites reach the server.
        sites: names of the sites.
        days: days until the certificates expire.

    Raises:
        ConfigError: if the address or a name is invalid.
        RunError: if the folder is not empty or cannot be created.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--address: {address!r} is not host:port, e.g. server.example.org:8000")
    if wrong := [name for name in sites if not NAME.fullmatch(name)]:
        raise ConfigError(f"--site: {wrong[0]!r} is not a valid name; use at most 64 letters, digits, _ . -")
    if len(set(sites)) < max(len(sites), 1):
        raise ConfigError("--site: name at least one site, and each site only once")
    # Imports PyTorch, for which a mistyped address should not wait.
    from fedmllm.privacy.secagg.roster import sign_roster

    require_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder}: the folder is not empty, and keys are never overwritten; choose another folder")
    authority = ec.generate_private_key(ec.SECP384R1())
    root = _certificate("fedmllm authority", authority.public_key(), authority, "fedmllm authority", days, ca=True)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = _certificate("fedmllm server", key.public_key(), authority, "fedmllm authority", days, host=host.strip("[]"))
    server = folder / "server"
    _write(folder / "authority" / "ca.key", _private(authority))
    for place in (folder / "authority", server):
        _write(place / "ca.crt", root.public_bytes(Encoding.PEM), secret=False)
    _write(server / "server.crt", certificate.public_bytes(Encoding.PEM), secret=False)
    _write(server / "server.key", _private(key))
    _write(server / "secret", secrets.token_bytes(32))
    keys = {name: _init_site(folder, address, name, 9094 + i, root) for i, name in enumerate(sorted(sites))}
    _write(server / ROSTER, sign_roster(authority, keys), secret=False)
    head = "# fedmllm server up server.yaml\n"
    _write(server / "server.yaml", (head + _yaml({"address": address, "listen": "0.0.0.0", "sites": sorted(sites)})).encode(), secret=False)


def sign(authority: Path, server: ServerConfig) -> Path:
    """Sign the list of a server's sites, for secure aggregation, and return its file beside ``server.yaml``.

    Args:
        authority: file with the authority's private key, ``ca.key``.
        server: the server's settings. ``NAME.pub`` beside its file is a site's public key.

    Raises:
        ConfigError: if a key is missing, is not the authority's, or is not on P-384.
        FederationError: if two sites have the same key.
    """
    from fedmllm.privacy.secagg.roster import sign_roster

    key = _authority(authority)
    root = x509.load_pem_x509_certificate((server.folder / "ca.crt").read_bytes())
    if root.public_key() != key.public_key():
        raise ConfigError(
            f"{authority}: not the key of the authority in {server.folder / 'ca.crt'}; use the ca.key that site init created with it"
        )
    file = server.folder / ROSTER
    write_atomically(file, sign_roster(key, server.public_keys()))
    return file


def _authority(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not the authority's private key ({error}); name the ca.key that site init created") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: not a key on an elliptic curve; name the ca.key that site init created")
    return key


def _init_site(folder: Path, address: str, name: str, port: int, root: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """Create a site's folder and return its public key."""
    key, own = ec.generate_private_key(ec.SECP384R1()), folder / "sites" / name
    _write(own / "site.key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    _write(folder / "server" / f"{name}.pub", key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH), secret=False)
    _write(own / "ca.crt", root.public_bytes(Encoding.PEM), secret=False)
    _write(own / "secret", secrets.token_bytes(32))
    head = "# fedmllm site up site.yaml\n"
    _write(own / "site.yaml", (head + _yaml({"name": name, "server": address, "port": port})).encode(), secret=False)
    return key.public_key()


def _certificate(
    name: str,
    key: ec.EllipticCurvePublicKey,
    authority: ec.EllipticCurvePrivateKey,
    issuer: str,
    days: int,
    host: str = "",
    ca: bool = False,
) -> x509.Certificate:
    """Return a signed certificate.

    A server's certificate contains its host, a name or an address, which clients verify, and localhost for connections from the same machine.
    """
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=0 if ca else None), critical=True)
    )
    if host:
        names = [_alternative(name) for name in dict.fromkeys([host, "localhost", "127.0.0.1"])]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(authority, hashes.SHA384())


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _yaml(values: dict[str, object]) -> str:
    return yaml.safe_dump(values, sort_keys=False)


def _write(path: Path, content: bytes, secret: bool = True) -> None:
    """Write a file. Secret files are readable only by their owner from the first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600 if secret else 0o644)
    path.write_bytes(content)
