"""The files that ``fedmllm site init`` creates, and the settings beside them."""

from __future__ import annotations

import ssl
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("flwr", reason="Flower is not installed: pip install 'fedmllm[flower]'")

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedmllm.errors import ConfigError, RunError
from fedmllm.flower.settings import ServerConfig, SiteConfig
from fedmllm.sites import keys


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "federation"
    keys.init(folder, "server.example.org:8000", ["b", "a"])
    return folder


def test_only_the_owner_can_read_secrets(made: Path) -> None:
    secret = {path.name for path in made.rglob("*") if path.is_file() and path.stat().st_mode & 0o077 == 0}
    assert secret == {"ca.key", "server.key", "secret", "site.key"}
    assert not list(made.glob("server/ca.key"))
    assert not list(made.glob("sites/*/ca.key"))


def test_a_site_gets_no_secret_of_the_server_or_another_site(made: Path) -> None:
    contents = {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    for name, content in contents.items():
        if name.endswith((".key", "secret")):
            assert sum(content == other for other in contents.values()) == 1, name


def test_the_servers_certificate_names_its_host_and_is_signed_by_the_authority(made: Path) -> None:
    certificate = x509.load_pem_x509_certificate((made / "server" / "server.crt").read_bytes())
    authority = x509.load_pem_x509_certificate((made / "sites" / "a" / "ca.crt").read_bytes())
    certificate.verify_directly_issued_by(authority)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["server.example.org", "localhost"]
    assert 824 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 825
    ssl.create_default_context(cafile=str(made / "sites" / "b" / "ca.crt"))


def test_the_address_may_be_an_ip_address(tmp_path: Path) -> None:
    keys.init(tmp_path / "f", "192.0.2.7:443", ["a"])
    certificate = x509.load_pem_x509_certificate((tmp_path / "f" / "server" / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "127.0.0.1"]


def test_the_server_has_each_sites_public_key(made: Path) -> None:
    server = ServerConfig.load(made / "server" / "server.yaml")
    assert server.sites == ("a", "b")
    assert server.listening == ("0.0.0.0", 8000)
    for name, content in server.keys().items():
        private = load_ssh_private_key((made / "sites" / name / "site.key").read_bytes(), None)
        public = load_ssh_public_key(content)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert private.public_key().public_numbers() == public.public_numbers()


def test_each_site_has_its_own_port(made: Path) -> None:
    sites = [SiteConfig.load(made / "sites" / name / "site.yaml") for name in ("a", "b")]
    assert [site.port for site in sites] == [9094, 9095]
    assert {site.server for site in sites} == {"server.example.org:8000"}


@pytest.mark.parametrize(
    ("address", "sites", "rule"),
    [
        ("localhost", ["a"], "'localhost' is not host:port"),
        (":8000", ["a"], "is not host:port"),
        ("host:99999", ["a"], "is not host:port"),
        ("host:1", ["a b"], "'a b' is not a valid name"),
        ("host:1", ["../a"], "'../a' is not a valid name"),
        ("host:1", ["a", "a"], "each site only once"),
        ("host:1", [], "name at least one site, and each site only once"),
    ],
)
def test_invalid_addresses_and_names_are_refused_before_anything_is_written(
    tmp_path: Path, address: str, sites: list[str], rule: str
) -> None:
    with pytest.raises(ConfigError, match=rule):
        keys.init(tmp_path / "f", address, sites)
    assert not (tmp_path / "f").exists()


def test_existing_keys_are_not_overwritten(made: Path) -> None:
    before = (made / "authority" / "ca.key").read_bytes()
    with pytest.raises(RunError, match="not empty"):
        keys.init(made, "host:1", ["a"])
    assert (made / "authority" / "ca.key").read_bytes() == before


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"nmae": "a"}, "nmae: is not a known setting; did you mean name?"),
        ({"name": "a/b"}, "name: must match"),
        ({"withhold": ["weights"]}, "withhold.0: must be 'metrics', 'profile' or 'num_samples'"),
        ({"data": {"dataset": "mnist"}}, "data.dataset: 'mnist' is not a known dataset"),
    ],
)
def test_settings_of_a_site_are_checked(tmp_path: Path, values: dict[str, Any], rule: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({"name": "a", "server": "host:1"} | values))
    with pytest.raises(ConfigError) as caught:
        SiteConfig.load(path)
    assert rule in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_or_invalid_settings_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file; fedmllm site init writes it"):
        ServerConfig.load(tmp_path / "server.yaml")
    (tmp_path / "server.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="are mappings of settings; found list"):
        ServerConfig.load(tmp_path / "server.yaml")
    (tmp_path / "server.yaml").write_text("address: host:1\nsites: [a]\n")
    with pytest.raises(ConfigError, match=r"a\.pub: no public key of site a"):
        ServerConfig.load(tmp_path / "server.yaml").keys()


def test_a_sites_data_paths_are_relative_to_its_settings_file(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("{name: a, server: 'host:1', data: {dataset: vqa_rad, root: data}}")
    data = SiteConfig.load(tmp_path / "site.yaml").data
    assert data is not None
    assert data.root == tmp_path / "data"


def test_a_node_is_identified_by_its_key_not_its_name(made: Path) -> None:
    link = ServerConfig.load(made / "server" / "server.yaml").link
    own = public_key_to_bytes(load_ssh_public_key(link.keys["a"]))  # type: ignore[arg-type]
    other = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
    nodes = [
        SimpleNamespace(name="a", public_key=other),
        SimpleNamespace(name="z", public_key=own),
        SimpleNamespace(name="b", public_key=other),
    ]
    assert link.sites_of(nodes) == {"a": nodes[1]}
    nodes[1].public_key = own.decode()
    assert link.sites_of(nodes) == {"a": nodes[1]}


def test_runs_bypass_the_proxy(made: Path) -> None:
    values = {"address": "hospital.example.org:8000", "sites": ["a", "b"], "folder": made / "server"}
    behind = ServerConfig.model_validate({**values, "listen": "127.0.0.1:8001"})
    assert (behind.listening, behind.link.address) == (("127.0.0.1", 8001), "127.0.0.1:8001")
    everywhere = ServerConfig.model_validate({**values, "listen": "0.0.0.0:8001"})
    assert (everywhere.listening, everywhere.link.address) == (("0.0.0.0", 8001), "127.0.0.1:8001")
    plain = ServerConfig.model_validate(values)
    assert (plain.listening, plain.link.address) == (("127.0.0.1", 8000), "hospital.example.org:8000")


@pytest.mark.parametrize(("name", "value"), [("address", "host"), ("address", "host:0"), ("listen", "127.0.0.1:port"), ("listen", ":8001")])
def test_an_invalid_address_is_refused(made: Path, name: str, value: str) -> None:
    file = made / "server" / "wrong.yaml"
    file.write_text(yaml.safe_dump({"address": "host:8000", "sites": ["a"], name: value}))
    with pytest.raises(ConfigError, match=f"{name}: .*{value!r} is not host:port"):
        ServerConfig.load(file)
