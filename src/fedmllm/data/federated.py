"""Divides a dataset over clients, and writes the manifest that makes the split verifiable."""

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
    """A dataset divided over clients.

    Attributes:
        dataset: the dataset. Its validation and test splits are complete and shared by all clients.
        clients: training samples by client id; empty for remote clients.
        dropped: number of samples that were removed because they lost every modality.
        reported: the self-reported sample counts of remote clients.
    """

    dataset: Dataset
    clients: Mapping[str, tuple[Sample, ...]]
    dropped: int
    reported: Mapping[str, Holding] = field(default_factory=dict)

    @property
    def profiles(self) -> dict[str, Profile]:
        """Each client's sample counts by modality; empty for a client that does not report them."""
        remote = {name: held.profile for name, held in self.reported.items()}
        return {name: remote.get(name, {}) if self.reported else profile(samples) for name, samples in self.clients.items()}


def federate(data: DataConfig, federation: FederationConfig, seed: int) -> FederatedData:
    """Load a dataset and divide it over clients.

    Raises:
        ConfigError, DataError: if settings and data contradict each other, or a client is left without samples.
    """
    return spread(load(data, seed), federation, seed)


def spread(dataset: Dataset, federation: FederationConfig, seed: int) -> FederatedData:
    """Divide a dataset over clients, apply the corruptions, and remove modalities according to the scenario.

    Raises:
        ConfigError, DataError: if settings and data contradict each other, or a client is left without samples.
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
    """Load a dataset before it is divided over clients.

    Raises:
        ConfigError, DataError: if settings are invalid, or rows or images are bad.
    """
    request = DatasetRequest(
        data.root, seed, data.num_train, data.num_test, data.on_bad_sample, data.options, data.num_validation, data.validation_share
    )
    dataset = load_dataset(data.dataset, request)
    if unused := data.wording.unused(dataset.modalities) if data.prompt in data.wordings else []:
        held = ", ".join(dataset.modalities)
        note = f"data.wordings.{data.prompt}: {', '.join(unused)} applies to no sample; the data hold {held}"
        dataset = replace(dataset, notes=(*dataset.notes, note))
    return repeated(decodable(dataset, data.on_bad_sample) if data.check_images else dataset, data.deduplicate)


def decodable(dataset: Dataset, policy: OnBadSample) -> Dataset:
    """Check that every image of a dataset can be decoded, and add notes on images that may not be upright.

    Args:
        dataset: the dataset.
        policy: whether broken images raise an error, or their samples are skipped and counted in the notes.

    Raises:
        DataError: if images are broken and the policy is to refuse; the message lists all of them.
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
    """Return the sample's image files that are not decoded yet."""
    picture = sample.content.get("image")
    return [picture] if isinstance(picture, (Path, bytes)) else []


def _problem(sample: Sample, broken: Mapping[Path | bytes, str]) -> str:
    """Return what is wrong with the sample's image; empty if nothing is. Files are named by their path, bytes by their sample."""
    found = [f"{sample.id}: {broken[s]}" if isinstance(s, bytes) else broken[s] for s in _pictures(sample) if s in broken]
    return "".join(found)


def _partition(dataset: Dataset, federation: FederationConfig, seed: int) -> tuple[list[str], Indices]:
    """Return the clients' names, and the positions of their samples in the training split.

    Samples of natural clients are never moved. Otherwise, if the scenario decides by client and some clients could keep nothing of some
    samples, the clients' modalities are decided first and samples go to clients that can hold them.
    """
    samples, count, least = dataset.train, federation.num_clients, federation.min_partition_size
    names = [client_id(i, count) for i in range(count)]
    if federation.partition == "domain" and not dataset.mixed:
        raise ConfigError(
            f"federation.partition: domain divides the datasets of a mixture, but {dataset.name} is a single dataset; use data.dataset=mixture"
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
    # Files are named after clients, so ids that are not plain words are replaced by numbers.
    plain = len(own_names) == count and all(re.fullmatch(r"\w[\w.-]{0,63}", name, re.ASCII) for name in own_names)
    return own_names if plain else names, natural(owners, count, least)


def _among_all(dataset: Dataset, federation: FederationConfig, rng: np.random.Generator) -> Indices:
    """Divide samples when every client can hold every sample."""
    categories, count, least = [sample.category for sample in dataset.train], federation.num_clients, federation.min_partition_size
    if federation.protocol == "reference":
        return reference.dirichlet(categories, _classes(dataset), count, federation.alpha)
    if federation.partition == "domain":
        return by_domain([sample.domain for sample in dataset.train], categories, count, federation.alpha, least, rng)
    return _divided(federation, categories, count, least, rng)


def _among_holders(samples: Sequence[Sample], holders: Holders, federation: FederationConfig, rng: np.random.Generator) -> Indices:
    """Divide each kind of sample among the clients that can hold it. The reference code's medical task has no label skew and no minimum size."""
    published = federation.protocol == "reference"

    def divide(rows: NDArray[np.int64], count: int) -> Indices:
        if published:
            return iid(len(rows), count, 0, rng)
        return _divided(federation, [samples[row].category for row in rows], count, 0, rng)

    if federation.partition == "domain":
        holders = holders.at_home()
    return holders.divided(divide, 1 if published else federation.min_partition_size, rng)


def _divided(federation: FederationConfig, categories: Sequence[str], count: int, least: int, rng: np.random.Generator) -> Indices:
    """Apply the configured partition to samples that all of ``count`` clients can hold."""
    if federation.partition == "iid":
        return iid(len(categories), count, least, rng)
    if federation.partition == "quantity":
        return quantity(len(categories), count, federation.alpha, least, rng)
    return dirichlet(categories, count, federation.alpha, least, rng)


def _classes(dataset: Dataset) -> Sequence[str]:
    """Return the categories, in the order of the options if the options are the categories."""
    options, found = dataset.train[0].options, {sample.category for sample in dataset.train}
    return options if found <= set(options) else sorted(found)


def client_id(index: int, num_clients: int) -> str:
    """Return an id such as ``client-07``. All ids have the same number of digits, so that they sort like numbers."""
    return f"client-{index:0{max(2, len(str(num_clients - 1)))}d}"


def _refuse_empty(clients: Mapping[str, Sequence[Sample]], complete: Mapping[str, Sequence[Sample]], scenario: str) -> None:
    empty = [f"{name}: 0 of {len(complete[name])} samples left" for name, samples in clients.items() if not samples]
    if empty:
        raise DataError(
            f"every client needs at least one sample; under scenario {scenario} these clients have none:\n{listing(empty)}\n"
            "use fewer clients, a larger federation.min_partition_size or a milder scenario"
        )


def manifest(data: FederatedData, scenario: str, seed: int) -> Record:
    """Return the split as JSON: each client's samples with their modalities and content digests, and the counts."""
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
    """Return a note on clients that do not report their number of samples; empty if all do."""
    if not (names := [name for name, held in reported.items() if held.num_samples is None]):
        return []
    return [
        f"{len(names)} client(s) do not report their number of samples and have weight 1 in averages by sample counts: {', '.join(names)}"
    ]


def _listed(samples: Sequence[Sample]) -> list[Record]:
    """Return each sample's id, modalities and content digest."""
    rows = zip(samples, sample_digests(samples), strict=True)
    return [{"id": sample.id, "modalities": list(sample.modalities), "digest": digest} for sample, digest in rows]


def _counts(samples: Sequence[Sample]) -> Record:
    labels = Counter(sample.category for sample in samples)
    return {"num_samples": len(samples), "labels": dict(sorted(labels.items())), "modalities": profile(samples)}
