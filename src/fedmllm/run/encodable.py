"""Finds samples that the model cannot encode before the first round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedmllm.data.datasets.rows import OnBadSample, skipped
from fedmllm.data.federated import FederatedData
from fedmllm.errors import DataError, ModelError, listing
from fedmllm.types import Sample

Encode = Callable[[Sample], object]
"""An ``Encoder``. It caches its results, so that checking samples early costs nothing."""

_VALIDATION, _TEST = "the validation split", "the test split"


def encodable(
    data: FederatedData, encode: Encode, policy: OnBadSample, progress: Callable[[int, int], None] = lambda done, total: None
) -> FederatedData:
    """Return the data without samples that are too long for the model or that its processor rejects.

    Args:
        data: the clients' samples, the validation split and the test split.
        encode: turns a sample into tensors.
        policy: whether to refuse such samples, in one error for all, or to skip them and count them in the notes.
        progress: called with the number of samples done and the total, because encoding images for a large model takes a while.

    Raises:
        DataError: listing all such samples, or naming a client or split that has no other samples.
    """
    holders = {**data.clients, _VALIDATION: data.dataset.validation, _TEST: data.dataset.test}
    everything = [sample for samples in holders.values() for sample in samples]
    bad = _problems(_counted(everything, progress), encode, policy)
    if not bad:
        return data
    left = {name: tuple(s for s in samples if s.id not in bad) for name, samples in holders.items()}
    if empty := [name for name in left if holders[name] and not left[name]]:
        raise DataError(f"{', '.join(empty)}: the model cannot encode any of the samples:\n{listing(bad.values())}")
    notes = skipped(f"{len(bad):,} sample(s) skipped that the model cannot encode", list(bad.values()))
    dataset = replace(data.dataset, validation=left.pop(_VALIDATION), test=left.pop(_TEST), notes=(*data.dataset.notes, *notes))
    return replace(data, dataset=dataset, clients=left)


def _counted(samples: Sequence[Sample], progress: Callable[[int, int], None]) -> Iterator[Sample]:
    for done, sample in enumerate(samples):
        yield sample
        progress(done + 1, len(samples))


def usable(samples: Sequence[Sample], encode: Encode, policy: OnBadSample) -> tuple[Sample, ...]:
    """Return the samples that the model can encode.

    Raises:
        DataError: listing all others if the policy is ``refuse``, or if no sample is left.
    """
    bad = _problems(samples, encode, policy)
    left = tuple(sample for sample in samples if sample.id not in bad)
    if samples and not left:
        raise DataError(f"the model cannot encode any of the {len(samples):,} samples:\n{listing(bad.values())}")
    return left


def _problems(samples: Iterable[Sample], encode: Encode, policy: OnBadSample) -> Mapping[str, str]:
    """Return the problems of samples that the model cannot encode, by sample id."""
    bad: dict[str, str] = {}
    for sample in samples:
        try:
            encode(sample)
        except (ModelError, DataError) as error:
            bad[sample.id] = str(error)
    if bad and policy == "refuse":
        remedy = "correct them, or set data.on_bad_sample to skip"
        raise DataError(f"the model cannot encode {len(bad):,} sample(s); {remedy}:\n{listing(bad.values())}")
    return bad
