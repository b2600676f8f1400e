"""Which modalities each client and sample keeps: the four scenarios of the FedMLLM benchmark (arXiv 2411.14717).

A scenario is a small function that, for given clients, returns a rule ``(client, sample) -> modalities kept``. Every
decision draws from a generator of its own, keyed by client or sample, so that it does not depend on any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmllm.errors import ConfigError
from fedmllm.randomness import generator
from fedmllm.types import Modality, Sample

Keep = Callable[[str, Sample], Sequence[Modality]]


@dataclass(frozen=True)
class Setting:
    """What a scenario works with: its level, the clients, the dataset's modalities and the experiment's seed."""

    level: str
    clients: tuple[str, ...]
    modalities: tuple[Modality, ...]
    seed: int


def aligned(setting: Setting) -> Keep:
    """Every sample keeps all it has; the level is the Dirichlet alpha of the label skew."""
    return lambda client, sample: sample.modalities


def missing(setting: Setting) -> Keep:
    """In every sample each modality is lost independently with probability ``level``."""
    rate = float(setting.level)

    def keep(client: str, sample: Sample) -> list[Modality]:
        draws = generator(setting.seed, "missing", sample.id).random(len(setting.modalities))
        return [name for name, draw in zip(setting.modalities, draws, strict=True) if draw >= rate]

    return keep


def cross(setting: Setting) -> Keep:
    """Each client holds one modality only; ``level`` is the ratio image-only : text-only."""
    images, texts = (float(part) for part in setting.level.split(":"))
    count = round(len(setting.clients) * images / (images + texts))
    rng = generator(setting.seed, "cross")
    chosen = {setting.clients[i] for i in rng.choice(len(setting.clients), size=count, replace=False)}
    return lambda client, sample: ["image"] if client in chosen else ["text"]


def hybrid(setting: Setting) -> Keep:
    """Each client holds each modality with probability ``level``; one that holds none keeps one at random per sample."""
    rate = float(setting.level)

    def keep(client: str, sample: Sample) -> list[Modality]:
        draws = generator(setting.seed, "hybrid", client).random(len(setting.modalities))
        held = [name for name, draw in zip(setting.modalities, draws, strict=True) if draw < rate]
        return held or [str(generator(setting.seed, "hybrid", client, sample.id).choice(setting.modalities))]

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
    scenario: str, clients: Mapping[str, Sequence[Sample]], modalities: tuple[Modality, ...], seed: int
) -> tuple[dict[str, tuple[Sample, ...]], int]:
    """Clients with what the scenario leaves them, and how many samples lost everything and were dropped.

    Raises:
        ConfigError: if the scenario separates modalities and the dataset has but one.
    """
    name, level = parse_scenario(scenario)
    if SCENARIOS[name].needs_two and not {"image", "text"} <= set(modalities):
        raise ConfigError(
            f"federation.scenario: {scenario} needs images and texts, the dataset's samples hold {' and '.join(modalities)} only; use aligned or missing"
        )
    keep = SCENARIOS[name].plan(Setting(level, tuple(clients), modalities, seed))
    kept = {client: tuple(_reduce(sample, keep(client, sample)) for sample in samples) for client, samples in clients.items()}
    left = {client: tuple(sample for sample in samples if sample.content) for client, samples in kept.items()}
    dropped = sum(map(len, kept.values())) - sum(map(len, left.values()))
    return left, dropped


def _reduce(sample: Sample, kept: Sequence[Modality]) -> Sample:
    """The sample with only those entries of its content."""
    return replace(sample, content={name: value for name, value in sample.content.items() if name in kept})
