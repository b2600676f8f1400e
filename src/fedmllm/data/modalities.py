"""Applies a modality scenario to the samples of the clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fedmllm.data.scenarios import SCENARIOS, Holdings, Protocol, Scenario, Setting, parse_scenario
from fedmllm.errors import ConfigError
from fedmllm.types import Modality, Sample


def holdings(
    scenario: str,
    clients: Sequence[str],
    modalities: tuple[Modality, ...],
    seed: int,
    *,
    protocol: Protocol = "clean",
    by_client: bool = False,
) -> Holdings:
    """Return the modalities that each client holds, if the scenario decides this by client. Clients not listed may hold any modality.

    Raises:
        ConfigError: if the scenario needs images and texts and the dataset lacks one of them.
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
    """Apply a scenario to the clients' samples.

    Args:
        scenario: the scenario with its level, e.g. ``missing-0.4``.
        clients: each client's samples.
        modalities: the dataset's modalities.
        seed: the experiment's seed.
        protocol: which random draws to use.
        keep_empty: whether to keep samples that lost every modality. They consist of their question only.
        by_client: see ``Setting``.

    Returns:
        the clients' remaining samples, and the number of samples that were removed because they lost every modality.

    Raises:
        ConfigError: if the scenario needs images and texts and the dataset lacks one of them.
    """
    row, setting = _checked(scenario, Setting("", tuple(clients), modalities, seed, protocol, by_client))
    keep = row.plan(setting)
    kept = {client: tuple(keep_only(sample, keep(client, sample)) for sample in samples) for client, samples in clients.items()}
    if keep_empty:
        return kept, 0
    left = {client: tuple(sample for sample in samples if sample.content) for client, samples in kept.items()}
    return left, sum(map(len, kept.values())) - sum(map(len, left.values()))


def _checked(scenario: str, setting: Setting) -> tuple[Scenario, Setting]:
    """Return a scenario's entry, and its arguments with the level filled in."""
    name, level = parse_scenario(scenario)
    row = SCENARIOS[name]
    if row.needs_two and not {"image", "text"} <= set(setting.modalities):
        held = " and ".join(setting.modalities)
        raise ConfigError(
            f"federation.scenario: {scenario} needs images and texts, but the dataset's samples hold only {held}; use aligned or missing"
        )
    return row, replace(setting, level=level)


def keep_only(sample: Sample, kept: Sequence[Modality]) -> Sample:
    """Return the sample with only these modalities, or the sample itself if it loses none."""
    if set(sample.content) <= set(kept):
        return sample
    return replace(sample, content={name: value for name, value in sample.content.items() if name in kept})


def profile(samples: Iterable[Sample]) -> dict[str, int]:
    """Count samples by their modalities, e.g. ``{"image+text": 12, "text": 3}``, in alphabetical order."""
    return dict(sorted(Counter("+".join(sample.modalities) or "none" for sample in samples).items()))
