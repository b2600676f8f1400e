"""Clients with their samples, and the manifest that makes a split checkable."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedmllm.data import reference
from fedmllm.data.content import repeated, sample_digests
from fedmllm.data.datasets import Dataset, DatasetRequest, load_dataset
from fedmllm.data.datasets.rows import OnBadSample, skipped
from fedmllm.data.holders import Holders
from fedmllm.data.images import check_images
from fedmllm.data.modalities import apply_scenario, holdings, profile
from fedmllm.data.partition import Indices, by_domain, dirichlet, iid, natural, quantity
from fedmllm.data.quality import parse_part
from fedmllm.data.settings import DataConfig, FederationConfig
from fedmllm.errors import ConfigError, DataError, listing
from fedmllm.randomness import generator
from fedmllm.types import Holding, Profile, Record, Sample


@dataclass(frozen=True)
class FederatedData:
    """A dataset spread over clients.

    Attributes:
        dataset: where the samples come from; its validation part and its test split are complete and shared by all.
        clients: training samples by client id.
        dropped: samples that lost every modality and were left out.
        reported: self-reported sample counts of remote clients, whose samples are not in ``clients``; by client.
    """

    dataset: Dataset
    clients: Mapping[str, tuple[Sample, ...]]
    dropped: int
    reported: Mapping[str, Holding] = field(default_factory=dict)

    @property
    def profiles(self) -> dict[str, Profile]:
        """By client, its samples by modalities; empty for a client that does not say."""
        elsewhere = {name: held.profile for name, held in self.reported.items()}
        return {name: elsewhere.get(name, {}) if self.reported else profile(samples) for name, samples in self.clients.items()}


def federate(data: DataConfig, federation: FederationConfig, seed: int) -> FederatedData:
    """Load a dataset and spread it over clients.

    Raises:
        ConfigError, DataError: if settings and data do not fit each other, or a client is left without samples.
    """
    return spread(load(data, seed), federation, seed)


def spread(dataset: Dataset, federation: FederationConfig, seed: int) -> FederatedData:
    """Spread a dataset over clients, and take away what the scenario says.

    Raises:
        ConfigError, DataError: if settings and data do not fit each other, or a client is left without samples.
    """
    names, parts = _partition(dataset, federation, seed)
    complete = {name: [dataset.train[j] for j in part] for name, part in zip(names, parts, strict=True)}
    altered = complete
    for alter in map(parse_part, federation.heterogeneity):
        altered = {name: alter(name, samples, seed) for name, samples in altered.items()}
    clients, dropped = apply_scenario(
        federation.scenario,
        altered,
        dataset.modalities,
        seed,
        protocol=federation.protocol,
        keep_empty=federation.keep_empty,
        by_client=dataset.mixed,
    )
    _refuse_empty(clients, complete, federation.scenario)
    return FederatedData(dataset, clients, dropped)


def load(data: DataConfig, seed: int) -> Dataset:
    """The samples before they are spread.

    Raises:
        ConfigError, DataError: if settings are wrong, or rows or pictures are bad.
    """
    request = DatasetRequest(
        data.root, seed, data.num_train, data.num_test, data.on_bad_sample, data.options, data.num_validation, data.validation_share
    )
    dataset = load_dataset(data.dataset, request)
    if unused := data.wording.unused(dataset.modalities) if data.prompt in data.wordings else []:
        held = ", ".join(dataset.modalities)
        note = f"data.wordings.{data.prompt}: {', '.join(unused)} applies to no sample, the data hold {held}"
        dataset = replace(dataset, notes=(*dataset.notes, note))
    return repeated(decodable(dataset, data.on_bad_sample) if data.check_images else dataset, data.deduplicate)


def decodable(dataset: Dataset, policy: OnBadSample) -> Dataset:
    """The dataset, every picture of which decodes.

    Raises:
        DataError: listing all pictures that do not, if the policy is to refuse.
    """
    broken, turned = check_images(source for sample in dataset.samples for source in _pictures(sample))
    dataset = replace(dataset, notes=(*dataset.notes, *skipped(f"{len(turned):,} picture(s) may not be upright", turned)))
    if not broken:
        return dataset
    bad = {sample.id: problem for sample in dataset.samples if (problem := _problem(sample, broken))}
    problems = list(dict.fromkeys(bad.values()))
    if policy == "refuse":
        raise DataError(f"{len(problems)} image(s) cannot be used; replace them, or set data.on_bad_sample to skip:\n{listing(problems)}")
    train, validation, test = (
        tuple(sample for sample in samples if sample.id not in bad) for samples in (dataset.train, dataset.validation, dataset.test)
    )
    notes = skipped(f"{len(bad):,} sample(s) skipped for {len(problems):,} image(s) that cannot be used", problems)
    return replace(dataset, train=train, validation=validation, test=test, notes=(*dataset.notes, *notes))


def _pictures(sample: Sample) -> list[Path | bytes]:
    """What of a sample is still to be decoded."""
    picture = sample.content.get("image")
    return [picture] if isinstance(picture, (Path, bytes)) else []


def _problem(sample: Sample, broken: Mapping[Path | bytes, str]) -> str:
    """What is wrong with the sample's picture; a file names itself, bytes are named by their sample."""
    found = [f"{sample.id}: {broken[s]}" if isinstance(s, bytes) else broken[s] for s in _pictures(sample) if s in broken]
    return "".join(found)


def _partition(dataset: Dataset, federation: FederationConfig, seed: int) -> tuple[list[str], Indices]:
    """Names of the clients, and positions in the training split.

    What the data's own clients hold cannot be moved. Else, where a scenario leaves clients that could keep nothing of some samples, holders are
    decided first.
    """
    samples, count, least = dataset.train, federation.num_clients, federation.min_partition_size
    names = [client_id(i, count) for i in range(count)]
    if federation.partition == "domain" and not dataset.mixed:
        raise ConfigError(
            f"federation.partition: domain spreads the datasets of a mixture, {dataset.name} is a single dataset; use data.dataset=mixture"
        )
    if federation.partition == "natural":
        return _natural(samples, names, least)
    decided = holdings(federation.scenario, names, dataset.modalities, seed, protocol=federation.protocol, by_client=dataset.mixed)
    holders = Holders.of(samples, names, decided) if decided else None
    if holders is None or holders.able.all():
        return names, _among_all(dataset, federation, generator(seed, "partition"))
    return names, _among_holders(samples, holders, federation, generator(seed, "partition"))


def _natural(samples: Sequence[Sample], names: list[str], least: int) -> tuple[list[str], Indices]:
    owners, count = [sample.client for sample in samples], len(names)
    own_names = sorted(set(owners))
    # Files are named after clients: an id that is no plain word gives way to a number.
    plain = len(own_names) == count and all(re.fullmatch(r"\w[\w.-]{0,63}", name, re.ASCII) for name in own_names)
    return own_names if plain else names, natural(owners, count, least)


def _among_all(dataset: Dataset, federation: FederationConfig, rng: np.random.Generator) -> Indices:
    """Anybody can hold anything."""
    categories, count, least = [sample.category for sample in dataset.train], federation.num_clients, federation.min_partition_size
    if federation.protocol == "reference":
        return reference.dirichlet(categories, _classes(dataset), count, federation.alpha)
    if federation.partition == "domain":
        return by_domain([sample.domain for sample in dataset.train], categories, count, federation.alpha, least, rng)
    return _divided(federation, categories, count, least, rng)


def _among_holders(samples: Sequence[Sample], holders: Holders, federation: FederationConfig, rng: np.random.Generator) -> Indices:
    """Each kind of sample spread among its holders. The reference code's medical task has no label skew, and no least size."""
    published = federation.protocol == "reference"

    def divide(rows: NDArray[np.int64], count: int) -> Indices:
        if published:
            return iid(len(rows), count, 0, rng)
        return _divided(federation, [samples[row].category for row in rows], count, 0, rng)

    if federation.partition == "domain":
        holders = holders.at_home()
    return holders.divided(divide, 1 if published else federation.min_partition_size, rng)


def _divided(federation: FederationConfig, categories: Sequence[str], count: int, least: int, rng: np.random.Generator) -> Indices:
    """The configured partition of samples that all of ``count`` clients can hold."""
    if federation.partition == "iid":
        return iid(len(categories), count, least, rng)
    if federation.partition == "quantity":
        return quantity(len(categories), count, federation.alpha, least, rng)
    return dirichlet(categories, count, federation.alpha, least, rng)


def _classes(dataset: Dataset) -> Sequence[str]:
    """In the order of the options, where these are the categories."""
    options, found = dataset.train[0].options, {sample.category for sample in dataset.train}
    return options if found <= set(options) else sorted(found)


def client_id(index: int, num_clients: int) -> str:
    """``client-07``: as many digits as the largest needs, so that ids sort like numbers."""
    return f"client-{index:0{max(2, len(str(num_clients - 1)))}d}"


def _refuse_empty(clients: Mapping[str, Sequence[Sample]], complete: Mapping[str, Sequence[Sample]], scenario: str) -> None:
    empty = [f"{name}: 0 of {len(complete[name])} samples left" for name, samples in clients.items() if not samples]
    if empty:
        raise DataError(
            f"every client needs a sample; under scenario {scenario} these have none:\n{listing(empty)}\n"
            "use fewer clients, a larger federation.min_partition_size or a milder scenario"
        )


def manifest(data: FederatedData, scenario: str, seed: int) -> Record:
    """The split as JSON: who holds which samples with which modalities and content, and the counts."""
    clients = [
        {"id": name, **_counts(samples), "samples": _listed(samples)} for name, samples in data.clients.items() if name not in data.reported
    ]
    clients += [
        {"id": name, "num_samples": held.num_samples, "labels": {}, "modalities": dict(held.profile), "samples": []}
        for name, held in data.reported.items()
    ]
    dataset = data.dataset
    return {
        "dataset": dataset.name,
        "scenario": scenario,
        "seed": seed,
        "metric": dataset.metric,
        "notes": [*dataset.notes, *_withheld(data.reported)],
        "dropped": data.dropped,
        "clients": clients,
        "validation": _counts(dataset.validation) | {"samples": _listed(dataset.validation)},
        "test": _counts(dataset.test) | {"samples": _listed(dataset.test)},
    }


def _withheld(reported: Mapping[str, Holding]) -> list[str]:
    """Which clients do not tell how many samples they have, in words; none if all do."""
    if not (names := [name for name, held in reported.items() if held.num_samples is None]):
        return []
    return [
        f"{len(names)} client(s) withhold how many samples they have, and count as one sample each in averages by samples: {', '.join(names)}"
    ]


def _listed(samples: Sequence[Sample]) -> list[Record]:
    """Each sample by its id, what it holds, and a digest of that."""
    rows = zip(samples, sample_digests(samples), strict=True)
    return [{"id": sample.id, "modalities": list(sample.modalities), "digest": digest} for sample, digest in rows]


def _counts(samples: Sequence[Sample]) -> Record:
    labels = Counter(sample.category for sample in samples)
    return {"num_samples": len(samples), "labels": dict(sorted(labels.items())), "modalities": profile(samples)}
