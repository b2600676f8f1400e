"""Samples that a model does not take, found before the first round instead of in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from fedmllm.data.datasets.rows import OnBadSample, skipped
from fedmllm.data.federated import FederatedData
from fedmllm.errors import DataError, ModelError, listing
from fedmllm.types import Sample

Encode = Callable[[Sample], object]
"""An ``Encoder``, which keeps what it makes, so that asking early costs nothing."""

_VALIDATION, _TEST = "the validation part", "the test split"


def encodable(
    data: FederatedData, encode: Encode, policy: OnBadSample, tell: Callable[[int, int], None] = lambda done, total: None
) -> FederatedData:
    """The data without samples that are too long for the model, or that its processor does not take.

    Args:
        data: of a run's clients, the validation part and the test split.
        encode: makes tensors of a sample.
        policy: whether such samples are refused, all in one error, or left out and counted in the notes.
        tell: told how many samples are done, and of how many: pictures of a large model take a while.

    Raises:
        DataError: listing all of them, or naming a client or split that nothing is left of.
    """
    holders = {**data.clients, _VALIDATION: data.dataset.validation, _TEST: data.dataset.test}
    everything = [sample for samples in holders.values() for sample in samples]
    bad = _problems(_counted(everything, tell), encode, policy)
    if not bad:
        return data
    left = {name: tuple(s for s in samples if s.id not in bad) for name, samples in holders.items()}
    if empty := [name for name in left if holders[name] and not left[name]]:
        raise DataError(f"{', '.join(empty)}: the model takes none of the samples:\n{listing(bad.values())}")
    notes = skipped(f"{len(bad):,} sample(s) skipped that the model does not take", list(bad.values()))
    dataset = replace(data.dataset, validation=left.pop(_VALIDATION), test=left.pop(_TEST), notes=(*data.dataset.notes, *notes))
    return replace(data, dataset=dataset, clients=left)


def _counted(samples: Sequence[Sample], tell: Callable[[int, int], None]) -> Iterator[Sample]:
    for done, sample in enumerate(samples):
        yield sample
        tell(done + 1, len(samples))


def usable(samples: Sequence[Sample], encode: Encode, policy: OnBadSample) -> tuple[Sample, ...]:
    """The same of some samples.

    Raises:
        DataError: listing all that the model does not take if the policy is to refuse, or if none is left.
    """
    bad = _problems(samples, encode, policy)
    left = tuple(sample for sample in samples if sample.id not in bad)
    if samples and not left:
        raise DataError(f"the model takes none of the {len(samples):,} samples:\n{listing(bad.values())}")
    return left


def _problems(samples: Iterable[Sample], encode: Encode, policy: OnBadSample) -> Mapping[str, str]:
    """What is wrong with samples, by id."""
    bad: dict[str, str] = {}
    for sample in samples:
        try:
            encode(sample)
        except (ModelError, DataError) as error:
            bad[sample.id] = str(error)
    if bad and policy == "refuse":
        remedy = "correct them, or set data.on_bad_sample to skip"
        raise DataError(f"{len(bad):,} sample(s) that the model does not take; {remedy}:\n{listing(bad.values())}")
    return bad
