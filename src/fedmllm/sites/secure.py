"""A site in secure aggregation: its own key and limits, the signed list of sites, and the rounds that it has masked a vector for."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedmllm.config import Experiment
from fedmllm.engine.parties import Identity, Parties
from fedmllm.errors import ConfigError, FederationError
from fedmllm.flower.sessions import StageFacts
from fedmllm.flower.settings import SiteConfig
from fedmllm.privacy.secagg.policy import Policy
from fedmllm.privacy.secagg.roster import verify_roster
from fedmllm.privacy.secagg.statements import SiteKey
from fedmllm.privacy.secagg.used import UsedRounds
from fedmllm.run.secure import encoding

MASKED = "masked.jsonl"
"""Name of the list of used rounds in the site's folder. It spans all runs and must be kept."""


def require_secure(site: SiteConfig, experiment: Experiment) -> None:
    """Check that an experiment respects the site's limits.

    Raises:
        ConfigError: if not.
    """
    if not experiment.privacy.secure_aggregation:
        if site.secure_aggregation:
            raise ConfigError(
                "secure_aggregation: this site does not show its updates to the server; set privacy.secure_aggregation=true in the experiment"
            )
        return
    cohort = experiment.federation.clients_per_round
    if (site.min_clients or 0) > cohort:
        raise ConfigError(
            f"min_clients: this site takes part in sums of at least {site.min_clients} clients, but a round has {cohort}; raise "
            "federation.clients_per_round in the experiment"
        )
    if experiment.privacy.unit == "client" and experiment.privacy.noise_multiplier is None:
        raise ConfigError("privacy.noise_multiplier: null, so that this site does not know the scale of the sum; update the server")


def site_parties(site: SiteConfig, experiment: Experiment) -> Parties | None:
    """Return the site as a client of secure sessions; None without secure aggregation. Its noise is never that of the server's ``noise_seed``.

    Raises:
        ConfigError: if its key cannot be read.
    """
    config = experiment.privacy
    if not config.secure_aggregation:
        return None
    least = max(site.min_clients or 2, config.smallest_sum(experiment.federation.clients_per_round))
    own = Identity(site_key(site), UsedRounds(site.folder / MASKED), Policy(least, site.largest_share))
    return Parties(encoding(experiment, config.noise_multiplier if config.unit == "client" else None), lambda client: own, {})


def site_key(site: SiteConfig) -> SiteKey:
    """Return the site's private key.

    Raises:
        ConfigError: if it is missing, or not an OpenSSH key on P-384.
    """
    file = site.folder / "site.key"
    try:
        key = load_ssh_private_key(file.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None  # The error could contain parts of the file.
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError("site.key: not an OpenSSH private key on P-384 without a passphrase; create it with ssh-keygen -t ecdsa -b 384")
    return key


def admit(site: SiteConfig, parties: Parties, facts: StageFacts) -> None:
    """Take the keys of all sites from the signed list in a message of stage ``keys``.

    Raises:
        FederationError: if the authority whose ``ca.crt`` this site holds did not sign it, or it has another key of this site.
    """
    if facts.step != "keys":
        return
    keys = verify_roster(facts.roster.encode(), x509.load_pem_x509_certificate((site.folder / "ca.crt").read_bytes()))
    if keys.get(site.name) != site_key(site).public_key():
        raise FederationError(f"the signed list of sites does not have the key of {site.name}; sign the list again with fedmllm site sign")
    parties.sites = keys
