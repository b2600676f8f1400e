"""The four modality scenarios of the FedMLLM benchmark (arXiv 2411.14717), which determine what each client and sample keeps.

A scenario is a small function that, for given clients, returns a rule ``(client, sample) -> modalities kept``. Every decision has its
own random number, keyed by client or sample, so that it does not depend on any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

from fedmllm.data import reference
from fedmllm.errors import ConfigError
from fedmllm.explain import meant
from fedmllm.randomness import generator, uniform
from fedmllm.registry import index
from fedmllm.types import Modality, Sample

Protocol = Literal["clean", "reference"]
"""Which random draws to use: those of this package, or those of the published reference code (see ``reference``)."""

Keep = Callable[[str, Sample], Sequence[Modality]]

Holdings = Mapping[str, tuple[Modality, ...]]
"""The modalities that each client holds."""


@dataclass(frozen=True)
class Setting:
    """The arguments of a scenario.

    Attributes:
        level: the scenario's level, as text.
        clients: names of the clients.
        modalities: the dataset's modalities.
        seed: the experiment's seed.
        protocol: which random draws to use.
        by_client: whether a client that draws no modality gets one modality for all its samples, as in the published medical task, instead
            of one for each sample.
    """

    level: str
    clients: tuple[str, ...]
    modalities: tuple[Modality, ...]
    seed: int
    protocol: Protocol = "clean"
    by_client: bool = False


def aligned(setting: Setting) -> Keep:
    """Keep all modalities of every sample. The level is the Dirichlet alpha of the label skew."""
    return lambda client, sample: sample.modalities


def missing(setting: Setting) -> Keep:
    """Remove each modality of every sample independently with probability ``level``."""
    rate = float(setting.level)

    def keep(client: str, sample: Sample) -> list[Modality]:
        return [name for name in sample.content if uniform(setting.seed, "missing", name, sample.id) >= rate]

    return keep


def cross(setting: Setting) -> Holdings:
    """Give each client a single modality. ``level`` is the ratio of image-only to text-only clients."""
    images, texts = (float(part) for part in setting.level.split(":"))
    count = round(len(setting.clients) * images / (images + texts))
    if setting.protocol == "reference":
        drawn = sorted(reference.cross(len(setting.clients), count))
    else:
        drawn = generator(setting.seed, "cross").choice(len(setting.clients), size=count, replace=False).tolist()
    chosen = {setting.clients[i] for i in drawn}
    return {client: ("image",) if client in chosen else ("text",) for client in setting.clients}


def hybrid(setting: Setting) -> Holdings:
    """Give each client each modality with probability ``level``. A client that draws none has an empty entry, or one modality if ``by_client``."""
    rate = float(setting.level)
    if setting.protocol == "reference":
        bits = reference.hybrid(len(setting.clients), rate)
        drawn = {
            client: tuple(name for name, bit in zip(("image", "text"), pair, strict=True) if bit)
            for client, pair in zip(setting.clients, bits, strict=True)
        }
    else:
        drawn = {c: tuple(m for m in setting.modalities if uniform(setting.seed, "hybrid", m, c) < rate) for c in setting.clients}
    if not setting.by_client:
        return drawn
    return {client: held or (_one(setting.modalities, setting.seed, client),) for client, held in drawn.items()}


def _one(modalities: Sequence[Modality], seed: int, *keys: str) -> Modality:
    """Choose one modality at random."""
    return modalities[int(uniform(seed, "hybrid", *keys) * len(modalities))]


def _by_client(decide: Callable[[Setting], Holdings]) -> Callable[[Setting], Keep]:
    """Turn a rule for clients into a rule for samples. A client without a modality keeps one random modality of each sample."""

    def plan(setting: Setting) -> Keep:
        holdings = decide(setting)

        def keep(client: str, sample: Sample) -> Sequence[Modality]:
            there = [name for name in setting.modalities if name in sample.content]
            return holdings[client] or (there and [_one(there, setting.seed, client, sample.id)])

        return keep

    return plan


@dataclass(frozen=True)
class Scenario:
    """A scenario in the index.

    Attributes:
        plan: returns the rule for samples.
        summary: a one-line description.
        default_level: the level if none is given.
        level_rule: the rule for levels, as text.
        valid: returns whether a level follows the rule.
        needs_two: whether the dataset needs images and texts.
        holdings: returns the modalities of each client, for scenarios that decide by client.
    """

    plan: Callable[[Setting], Keep]
    summary: str
    default_level: str
    level_rule: str
    valid: Callable[[str], bool]
    needs_two: bool = False
    holdings: Callable[[Setting], Holdings] | None = None


def _rate(level: str) -> bool:
    return 0 <= float(level) < 1


def _probability(level: str) -> bool:
    return 0 <= float(level) <= 1


def _ratio(level: str) -> bool:
    parts = [float(part) for part in level.split(":")]
    return len(parts) == 2 and min(parts) >= 0 and 0 < max(parts) < inf


SCENARIOS: Mapping[str, Scenario] = index(
    "scenario",
    {
        "aligned": Scenario(
            aligned,
            "all clients have all modalities; labels are skewed",
            "",
            "a Dirichlet alpha greater than 0 and at most 1e9",
            lambda x: 0 < float(x) <= 1e9,
        ),
        "missing": Scenario(missing, "each sample loses each modality with a given probability", "0.4", "a rate in [0, 1)", _rate),
        "cross": Scenario(
            _by_client(cross),
            "each client has a single modality",
            "5:5",
            "image-only:text-only, e.g. 3:7",
            _ratio,
            needs_two=True,
            holdings=cross,
        ),
        "hybrid": Scenario(
            _by_client(hybrid),
            "each client has each modality with a given probability",
            "0.7",
            "a probability in [0, 1]",
            _probability,
            needs_two=True,
            holdings=hybrid,
        ),
    },
)

SETTINGS = (
    *("aligned-5.0", "aligned-1.0", "aligned-0.5"),
    *("missing-0.3", "missing-0.4", "missing-0.5"),
    *("cross-3:7", "cross-5:5", "cross-7:3"),
    *("hybrid-0.8", "hybrid-0.7", "hybrid-0.6"),
)
"""The benchmark's twelve scenarios."""


def parse_scenario(text: str) -> tuple[str, str]:
    """Parse ``"missing-0.4"`` into ``("missing", "0.4")``. A name alone gets its default level.

    Raises:
        ConfigError: if the name is unknown or the level is invalid.
    """
    name, _, level = text.partition("-")
    if name not in SCENARIOS:
        raise ConfigError(f"{text!r} is not a scenario such as missing-0.4{meant(name, SCENARIOS)}")
    row = SCENARIOS[name]
    level = level or row.default_level
    try:
        valid = not level or row.valid(level)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{text!r}: the level of {name} must be {row.level_rule}")
    return name, level
