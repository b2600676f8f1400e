"""Settings of the files ``server.yaml`` and ``site.yaml``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fedmllm.data.settings import DataConfig
from fedmllm.errors import ConfigError, FederationError, listing
from fedmllm.explain import rule
from fedmllm.flower.superlink import SuperLink
from fedmllm.privacy.settings import SitePrivacy
from fedmllm.registry import load_plugins, resolved
from fedmllm.settings_file import SITES, read_settings

if TYPE_CHECKING:
    from fedmllm.privacy.secagg.statements import SitePublicKey

NAME = re.compile(r"\w[\w.-]{0,63}", re.ASCII)
"""Valid site names. Files are named after sites."""


ROSTER = "roster.json"
"""Name of the signed list of sites, beside ``server.yaml``."""


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    folder: Path = Field(exclude=True)
    """The folder of the file, with the keys and certificates that belong to it."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            ConfigError: naming every invalid setting.
        """
        values, _ = read_settings(path, SITES)
        try:
            return cls.model_validate({**values, "folder": path.resolve().parent})
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, e['loc']))}: {rule(e, cls.model_fields)}" for e in error.errors()]
            raise ConfigError(f"{path}: {len(problems)} error{'s' * (len(problems) > 1)}:\n{listing(problems)}") from None


class ServerConfig(_File):
    """``server.yaml``: the SuperLink, and the sites that may connect to it. Keys and certificates are in the same folder."""

    address: str
    """``host:port`` at which sites reach the SuperLink. The certificate contains the host."""
    listen: str = "127.0.0.1"
    """Local address on which the SuperLink listens; 0.0.0.0 for all interfaces. With a port, such as 127.0.0.1:8001, it listens on that port, and a
    proxy must forward connections from the port of ``address``."""
    sites: tuple[str, ...] = Field(min_length=1)
    """Names of the sites. ``NAME.pub`` in the same folder is a site's public key."""

    @field_validator("sites")
    @classmethod
    def _plain(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [name for name in sites if not NAME.fullmatch(name)]:
            raise ValueError(f"{wrong[0]!r} is not a valid name; use at most 64 letters, digits, _ . -")
        if len(set(sites)) < len(sites):
            raise ValueError("a name occurs twice; name each site once")
        return tuple(sorted(sites))

    @field_validator("address", "listen")
    @classmethod
    def _with_a_port(cls, text: str, info: ValidationInfo) -> str:
        host, colon, port = text.rpartition(":")
        needed = info.field_name == "address"
        if (colon or needed) and not (host and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(f"{text!r} is not host:port" + ("" if needed else ", nor a host alone"))
        return text

    @property
    def listening(self) -> tuple[str, int]:
        """Local host and port on which the SuperLink listens."""
        host, colon, port = self.listen.rpartition(":")
        return (host, int(port)) if colon else (self.listen, int(self.address.rpartition(":")[2]))

    @property
    def link(self) -> SuperLink:
        """The connection of a run's server to the SuperLink, which bypasses the proxy if there is one."""
        host, colon, port = self.listen.rpartition(":")
        nearest = self.address if not colon else f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        return SuperLink(nearest, self.folder / "ca.crt", self.folder / "secret", self.keys())

    def keys(self) -> dict[str, bytes]:
        """Return the sites' public keys by name.

        Raises:
            ConfigError: if a key is missing.
        """
        if missing := [name for name in self.sites if not (self.folder / f"{name}.pub").is_file()]:
            raise ConfigError(
                f"{self.folder / missing[0]}.pub: no public key of site {missing[0]}; add the file, or remove the site from server.yaml"
            )
        return {name: (self.folder / f"{name}.pub").read_bytes() for name in self.sites}

    def public_keys(self) -> dict[str, SitePublicKey]:
        """Return the sites' public keys by name.

        Raises:
            ConfigError: if a key is missing, or is not an OpenSSH key on P-384.
        """
        return {name: public_key(content, self.folder / f"{name}.pub") for name, content in self.keys().items()}

    def roster(self) -> tuple[str, dict[str, SitePublicKey]]:
        """Return the signed list of sites as text, and the keys in it.

        Raises:
            ConfigError: if it is missing, was not signed by the authority, or does not have the sites' current keys.
        """
        from fedmllm.privacy.secagg.roster import verify_roster

        file, remedy = self.folder / ROSTER, "run fedmllm site sign ca.key server.yaml where the authority's key is, and copy the file here"
        if not file.is_file():
            raise ConfigError(f"{file}: missing, but privacy.secure_aggregation needs the signed list of sites; {remedy}")
        content = file.read_bytes()
        try:
            signed = verify_roster(content, x509.load_pem_x509_certificate((self.folder / "ca.crt").read_bytes()))
        except FederationError as error:
            raise ConfigError(f"{file}: {error}") from error
        if changed := [name for name, key in self.public_keys().items() if signed.get(name) != key]:
            raise ConfigError(f"{file}: the key of {changed[0]} in the signed list is not the one in {changed[0]}.pub; {remedy}")
        return content.decode(), {name: signed[name] for name in self.sites}


def public_key(content: bytes, file: Path) -> SitePublicKey:
    """Return a site's public key for signatures.

    Raises:
        ConfigError: if it is not an OpenSSH key on P-384.
    """
    try:
        key = load_ssh_public_key(content)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{file}: not an OpenSSH public key on P-384; create the key with ssh-keygen -t ecdsa -b 384")
    return key


Withheld = Literal["metrics", "profile", "num_samples"]


class SiteConfig(_File):
    """``site.yaml``: the data that this site trains on, and what it reports to the server. Only the site reads this file."""

    name: str = Field(pattern=rf"^{NAME.pattern}$")
    """Name by which the server knows the site."""
    server: str
    """``host:port`` of the server."""
    port: int = Field(9094, gt=0, lt=65536)
    """Local port on 127.0.0.1 between the site's own processes."""
    data: DataConfig | None = None
    """The site's own data: a dataset's name, folder (relative to this file) and options. Without it, the site takes part in a trial run, on its
    share of the experiment's own split of embedded data."""
    modalities: tuple[str, ...] = ()
    """Modalities of the samples to use; leave it out for all."""
    model: str | None = None
    """Folder of the model at this site; leave it out for the embedded model. The site ignores the experiment's model name."""
    rank: int | None = Field(None, gt=0)
    """LoRA rank of this site, if the method supports different ranks; leave it out for the experiment's."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ..."""
    cpus: int = Field(1, gt=0)
    """CPU cores to use."""
    withhold: tuple[Withheld, ...] = ()
    """What the site does not report to the server: ``metrics`` (training loss and steps, scores of its personalized model), ``profile`` (samples by
    modality), ``num_samples`` (the site then counts as one sample in averages by samples). The site refuses a run whose method needs a withheld
    value. Steps that a method needs (FedNova) follow from the number of samples; the site reports them unless it withholds both."""

    secure_aggregation: bool = False
    """Refuse runs without ``privacy.secure_aggregation``, in which the server would see this site's updates."""
    min_clients: int | None = Field(None, ge=2)
    """With secure aggregation, the smallest number of clients in a sum that this site takes part in, if the experiment's is smaller."""
    largest_share: float = Field(0.8, gt=0, lt=1)
    """With secure aggregation, the largest share of a sum that one client's weight may have. A sum with the share 1 would be its update."""

    privacy: SitePrivacy | None = None
    """The site's own limits on what its updates reveal about each sample. The site then withholds ``metrics`` and ``profile`` too."""
    plugins: tuple[str, ...] = ()
    """Python files (relative to this file) and modules that add methods, datasets and more. The site imports no other plugins, not even installed
    ones, whatever the server requests."""

    @model_validator(mode="before")
    @classmethod
    def _with_plugins(cls, values: Any) -> Any:
        """Import plugins first, because ``data`` may select what they add."""
        if not isinstance(values, dict) or "plugins" not in values:
            return values
        names = resolved(values["plugins"], Path(values.get("folder", "")))
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            load_plugins(names, installed=False)
        return {**values, "plugins": names}

    @property
    def withheld(self) -> frozenset[Withheld]:
        """What the site does not report, given ``withhold`` and ``privacy``."""
        return frozenset(self.withhold) | (frozenset({"metrics", "profile"}) if self.privacy else frozenset())

    @model_validator(mode="after")
    def _beside_the_file(self) -> SiteConfig:
        if self.data is None or self.data.root is None or self.data.root.is_absolute():
            return self
        data = self.data.model_copy(update={"root": self.folder / self.data.root})
        object.__setattr__(self, "data", data)
        return self
