"""Which modalities each client and sample keeps: the four scenarios of the FedMLLM benchmark (arXiv 2411.14717).

A scenario is a small function that, for given clients, returns a rule ``(client, sample) -> modalities kept``. Every
decision draws from a generator of its own, keyed by client or sample, so that it does not depend on any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

from fedmllm.data import reference
from fedmllm.errors import ConfigError
from fedmllm.explain import meant
from fedmllm.randomness import generator, uniform
from fedmllm.registry import index
from fedmllm.types import Modality, Sample

Protocol = Literal["clean", "reference"]
"""Whose draws: ours, or those of the published reference code (see ``reference``)."""

Keep = Callable[[str, Sample], Sequence[Modality]]
Holdings = Mapping[str, tuple[Modality, ...]]
"""The modalities that each client holds."""


@dataclass(frozen=True)
class Setting:
    """What a scenario works with.

    Attributes:
        level: the scenario's.
        clients: their names.
        modalities: the dataset's.
        seed: the experiment's.
        protocol: whose draws.
        by_client: whether a client that draws no modality gets one for all its samples, as the published medical task does, and not one
            by sample.
    """

    level: str
    clients: tuple[str, ...]
    modalities: tuple[Modality, ...]
    seed: int
    protocol: Protocol = "clean"
    by_client: bool = False


def aligned(setting: Setting) -> Keep:
    """Every sample keeps all it has; the level is the Dirichlet alpha of the label skew."""
    return lambda client, sample: sample.modalities


def missing(setting: Setting) -> Keep:
    """In every sample each modality is lost independently with probability ``level``."""
    rate = float(setting.level)

    def keep(client: str, sample: Sample) -> list[Modality]:
        return [name for name in sample.content if uniform(setting.seed, "missing", name, sample.id) >= rate]

    return keep


def cross(setting: Setting) -> Holdings:
    """Each client holds one modality only; ``level`` is the ratio image-only : text-only."""
    images, texts = (float(part) for part in setting.level.split(":"))
    count = round(len(setting.clients) * images / (images + texts))
    if setting.protocol == "reference":
        drawn = sorted(reference.cross(len(setting.clients), count))
    else:
        drawn = generator(setting.seed, "cross").choice(len(setting.clients), size=count, replace=False).tolist()
    chosen = {setting.clients[i] for i in drawn}
    return {client: ("image",) if client in chosen else ("text",) for client in setting.clients}


def hybrid(setting: Setting) -> Holdings:
    """Each client holds each modality with probability ``level``; one that draws none holds none of its own, or one if ``by_client``."""
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
    """One of them at random."""
    return modalities[int(uniform(seed, "hybrid", *keys) * len(modalities))]


def _by_client(decide: Callable[[Setting], Holdings]) -> Callable[[Setting], Keep]:
    """What clients hold, as a rule for samples. A client without a modality of its own keeps in each sample one of what is there."""

    def plan(setting: Setting) -> Keep:
        holdings = decide(setting)

        def keep(client: str, sample: Sample) -> Sequence[Modality]:
            there = [name for name in setting.modalities if name in sample.content]
            return holdings[client] or (there and [_one(there, setting.seed, client, sample.id)])

        return keep

    return plan


@dataclass(frozen=True)
class Scenario:
    """A row of the index: the rule for samples, one line of description, the level's rule, and what clients hold if that is decided by client."""

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
            "all clients have all modalities, labels are skewed",
            "",
            "a Dirichlet alpha above 0, 1e9 at most",
            lambda x: 0 < float(x) <= 1e9,
        ),
        "missing": Scenario(missing, "each sample loses each modality at a rate", "0.4", "a rate in [0, 1)", _rate),
        "cross": Scenario(
            _by_client(cross),
            "each client has one modality only",
            "5:5",
            "image-only:text-only, e.g. 3:7",
            _ratio,
            needs_two=True,
            holdings=cross,
        ),
        "hybrid": Scenario(
            _by_client(hybrid),
            "each client has each modality with a probability",
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
"""The benchmark's twelve."""


def parse_scenario(text: str) -> tuple[str, str]:
    """``"missing-0.4"`` to ``("missing", "0.4")``; a name alone takes its default level.

    Raises:
        ConfigError: if the name is unknown or the level breaks its rule.
    """
    name, _, level = text.partition("-")
    if name not in SCENARIOS:
        raise ConfigError(f"{text!r} is no scenario, such as missing-0.4{meant(name, SCENARIOS)}")
    row = SCENARIOS[name]
    level = level or row.default_level
    try:
        valid = not level or row.valid(level)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{text!r}: the level of {name} must be {row.level_rule}")
    return name, level


def holdings(
    scenario: str,
    clients: Sequence[str],
    modalities: tuple[Modality, ...],
    seed: int,
    *,
    protocol: Protocol = "clean",
    by_client: bool = False,
) -> Holdings:
    """The modalities that each client holds, where the scenario says it of the client; who is not named may hold anything.

    Raises:
        ConfigError: if the scenario separates modalities and the dataset has but one.
    """
    row, setting = _checked(scenario, Setting("", tuple(clients), modalities, seed, protocol, by_client))
    found = {} if row.holdings is None else row.holdings(setting)
    return {client: held for client, held in found.items() if held}


def apply_scenario(
    scenario: str,
    clients: Mapping[str, Sequence[Sample]],
    modalities: tuple[Modality, ...],
    seed: int,
    *,
    protocol: Protocol = "clean",
    keep_empty: bool = False,
    by_client: bool = False,
) -> tuple[dict[str, tuple[Sample, ...]], int]:
    """Clients with what the scenario leaves them, and how many samples lost everything and were left out.

    With ``keep_empty`` none is: such samples keep their question alone. The other arguments are those of ``Setting``.

    Raises:
        ConfigError: if the scenario separates modalities and the dataset has but one.
    """
    row, setting = _checked(scenario, Setting("", tuple(clients), modalities, seed, protocol, by_client))
    keep = row.plan(setting)
    kept = {client: tuple(keep_only(sample, keep(client, sample)) for sample in samples) for client, samples in clients.items()}
    if keep_empty:
        return kept, 0
    left = {client: tuple(sample for sample in samples if sample.content) for client, samples in kept.items()}
    return left, sum(map(len, kept.values())) - sum(map(len, left.values()))


def _checked(scenario: str, setting: Setting) -> tuple[Scenario, Setting]:
    """A scenario's row, and what it works with at its level."""
    name, level = parse_scenario(scenario)
    row = SCENARIOS[name]
    if row.needs_two and not {"image", "text"} <= set(setting.modalities):
        held = " and ".join(setting.modalities)
        raise ConfigError(
            f"federation.scenario: {scenario} needs images and texts, the dataset's samples hold {held} only; use aligned or missing"
        )
    return row, replace(setting, level=level)


def keep_only(sample: Sample, kept: Sequence[Modality]) -> Sample:
    """The sample with only those entries of its content; itself if nothing is lost."""
    if set(sample.content) <= set(kept):
        return sample
    return replace(sample, content={name: value for name, value in sample.content.items() if name in kept})


def profile(samples: Iterable[Sample]) -> dict[str, int]:
    """How many samples hold which modalities, e.g. ``{"image+text": 12, "text": 3}``, in alphabetical order."""
    return dict(sorted(Counter("+".join(sample.modalities) or "none" for sample in samples).items()))
