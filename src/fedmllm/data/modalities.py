"""Which modalities each client and sample keeps: the four scenarios of the FedMLLM benchmark (arXiv 2411.14717).

A scenario is a small function that, for given clients, returns a rule ``(client, sample) -> modalities kept``. Every
decision draws from a generator of its own, keyed by client or sample, so that it does not depend on any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedmllm.data import reference
from fedmllm.errors import ConfigError
from fedmllm.randomness import generator, uniform
from fedmllm.types import Modality, Sample

Protocol = Literal["clean", "reference"]
"""Whose draws: ours, or those of the published reference code (see ``reference``)."""

Keep = Callable[[str, Sample], Sequence[Modality]]


@dataclass(frozen=True)
class Setting:
    """What a scenario works with: its level, the clients, the dataset's modalities, the experiment's seed and the protocol."""

    level: str
    clients: tuple[str, ...]
    modalities: tuple[Modality, ...]
    seed: int
    protocol: Protocol = "clean"


def aligned(setting: Setting) -> Keep:
    """Every sample keeps all it has; the level is the Dirichlet alpha of the label skew."""
    return lambda client, sample: sample.modalities


def missing(setting: Setting) -> Keep:
    """In every sample each modality is lost independently with probability ``level``."""
    rate = float(setting.level)

    def keep(client: str, sample: Sample) -> list[Modality]:
        return [name for name in sample.content if uniform(setting.seed, "missing", name, sample.id) >= rate]

    return keep


def cross(setting: Setting) -> Keep:
    """Each client holds one modality only; ``level`` is the ratio image-only : text-only."""
    images, texts = (float(part) for part in setting.level.split(":"))
    count = round(len(setting.clients) * images / (images + texts))
    if setting.protocol == "reference":
        drawn = sorted(reference.cross(len(setting.clients), count))
    else:
        drawn = generator(setting.seed, "cross").choice(len(setting.clients), size=count, replace=False).tolist()
    chosen = {setting.clients[i] for i in drawn}
    return lambda client, sample: ["image"] if client in chosen else ["text"]


def hybrid(setting: Setting) -> Keep:
    """Each client holds each modality with probability ``level``; one that holds none keeps one at random per sample."""
    rate = float(setting.level)
    bits = reference.hybrid(len(setting.clients), rate) if setting.protocol == "reference" else []
    published = {
        client: [name for name, bit in zip(("image", "text"), pair, strict=True) if bit]
        for client, pair in zip(setting.clients, bits, strict=False)
    }

    def keep(client: str, sample: Sample) -> list[Modality]:
        held = published.get(client) if published else [m for m in setting.modalities if uniform(setting.seed, "hybrid", m, client) < rate]
        return held or [setting.modalities[int(uniform(setting.seed, "hybrid", client, sample.id) * len(setting.modalities))]]

    return keep


@dataclass(frozen=True)
class Scenario:
    """A row of the index: the function, one line of description and the level's rule."""

    plan: Callable[[Setting], Keep]
    summary: str
    default_level: str
    level_rule: str
    valid: Callable[[str], bool]
    needs_two: bool = False


def _rate(level: str) -> bool:
    return 0 <= float(level) < 1


def _probability(level: str) -> bool:
    return 0 <= float(level) <= 1


def _ratio(level: str) -> bool:
    parts = [float(part) for part in level.split(":")]
    return len(parts) == 2 and min(parts) >= 0 and max(parts) > 0


SCENARIOS: Mapping[str, Scenario] = {
    "aligned": Scenario(
        aligned, "all clients have all modalities, labels are skewed", "", "a Dirichlet alpha above 0", lambda x: float(x) > 0
    ),
    "missing": Scenario(missing, "each sample loses each modality at a rate", "0.4", "a rate in [0, 1)", _rate),
    "cross": Scenario(cross, "each client has one modality only", "5:5", "image-only:text-only, e.g. 3:7", _ratio, needs_two=True),
    "hybrid": Scenario(
        hybrid, "each client has each modality with a probability", "0.7", "a probability in [0, 1]", _probability, needs_two=True
    ),
}


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
        raise ConfigError(f"{text!r} is no scenario; known: {', '.join(SCENARIOS)}, with a level after a dash, e.g. missing-0.4")
    row = SCENARIOS[name]
    level = level or row.default_level
    try:
        valid = not level or row.valid(level)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{text!r}: the level of {name} must be {row.level_rule}")
    return name, level


def apply_scenario(
    scenario: str,
    clients: Mapping[str, Sequence[Sample]],
    modalities: tuple[Modality, ...],
    seed: int,
    *,
    protocol: Protocol = "clean",
    keep_empty: bool = False,
) -> tuple[dict[str, tuple[Sample, ...]], int]:
    """Clients with what the scenario leaves them, and how many samples lost everything and were left out.

    With ``keep_empty`` none is: such samples keep their question alone.

    Raises:
        ConfigError: if the scenario separates modalities and the dataset has but one.
    """
    name, level = parse_scenario(scenario)
    if SCENARIOS[name].needs_two and not {"image", "text"} <= set(modalities):
        raise ConfigError(
            f"federation.scenario: {scenario} needs images and texts, the dataset's samples hold {' and '.join(modalities)} only; use aligned or missing"
        )
    keep = SCENARIOS[name].plan(Setting(level, tuple(clients), modalities, seed, protocol))
    kept = {client: tuple(keep_only(sample, keep(client, sample)) for sample in samples) for client, samples in clients.items()}
    if keep_empty:
        return kept, 0
    left = {client: tuple(sample for sample in samples if sample.content) for client, samples in kept.items()}
    return left, sum(map(len, kept.values())) - sum(map(len, left.values()))


def keep_only(sample: Sample, kept: Sequence[Modality]) -> Sample:
    """The sample with only those entries of its content; itself if nothing is lost."""
    if set(sample.content) <= set(kept):
        return sample
    return replace(sample, content={name: value for name, value in sample.content.items() if name in kept})


def profile(samples: Iterable[Sample]) -> dict[str, int]:
    """How many samples hold which modalities, e.g. ``{"image+text": 12, "text": 3}``, in alphabetical order."""
    return dict(sorted(Counter("+".join(sample.modalities) or "none" for sample in samples).items()))
