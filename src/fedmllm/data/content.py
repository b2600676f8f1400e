"""Content digests of samples, which reveal duplicates and changes regardless of names and ids."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from PIL.Image import Image

from fedmllm.data.datasets.base import Dataset
from fedmllm.data.datasets.rows import is_file
from fedmllm.data.fingerprint import picture_bytes
from fedmllm.types import Content, EditedImage, Sample


def content_digest(value: Content) -> str:
    """Return 16 hexadecimal digits that identify a text, a file's content, or an image's pixels and its pending edits."""
    if isinstance(value, EditedImage):
        return _digest(f"{content_digest(value.source)} {value.edits}".encode())
    if isinstance(value, Path):
        # A missing file raises an error only when it is opened.
        found = value.stat() if is_file(value) else None
        return _file_digest(value, found.st_size, found.st_mtime_ns) if found else "missing"
    if isinstance(value, Image):
        return _digest(picture_bytes(value))
    return _digest(value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass"))


def sample_digest(sample: Sample) -> str:
    """Return the digest of a sample's question, answer, options and content. Its id, client and category are ignored."""
    held = sorted((name, content_digest(value)) for name, value in sample.content.items())
    return _digest(repr((sample.question, sample.answer, sample.options, held)).encode("utf-8", "surrogatepass"))


def sample_digests(samples: Collection[Sample]) -> list[str]:
    """Return the digest of each sample. Files are read in parallel."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sample_digest, samples))


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@lru_cache(1 << 17)
def _file_digest(path: Path, size: int, changed: int) -> str:
    """Return a file's digest. It is cached until the file's size or modification time changes."""
    return _digest(path.read_bytes())


def repeated(dataset: Dataset, leave_out: bool) -> Dataset:
    """Add notes on duplicates to a dataset: repeated training samples, samples in two splits, and training samples with test images.

    Args:
        dataset: the dataset as loaded.
        leave_out: whether to remove these from the training split, and samples of the test split from the validation split.
    """
    train, validation, test = (sample_digests(samples) for samples in (dataset.train, dataset.validation, dataset.test))
    asked, chosen_by, shown = set(test), set(validation), {digest for sample in dataset.test for digest in _pictures(sample)}
    first = dict(zip(reversed(train), reversed(range(len(train))), strict=True))
    found = {
        "training sample(s) repeat another one": {i for i, digest in enumerate(train) if first[digest] != i},
        "training sample(s) are also in the test split": {i for i, digest in enumerate(train) if digest in asked},
        "training sample(s) are also in the validation split": {i for i, digest in enumerate(train) if digest in chosen_by},
        "training sample(s) show an image of the test split": {i for i, s in enumerate(dataset.train) if shown & _pictures(s)},
    }
    remedy = "left out" if leave_out else "data.deduplicate leaves them out"
    known = {i for i, digest in enumerate(validation) if digest in asked}
    counted = found | {"validation sample(s) are also in the test split": known}
    notes = tuple(f"{len(which):,} {what}; {remedy}" for what, which in counted.items() if which)
    if leave_out:
        dataset = replace(
            dataset, train=_without(dataset.train, set().union(*found.values())), validation=_without(dataset.validation, known)
        )
    return replace(dataset, notes=(*dataset.notes, *notes))


def _without(samples: Sequence[Sample], places: Set[int]) -> tuple[Sample, ...]:
    return tuple(sample for i, sample in enumerate(samples) if i not in places)


def _pictures(sample: Sample) -> set[str]:
    """Return the digests of all content other than text."""
    return {content_digest(value) for value in sample.content.values() if not isinstance(value, str)}


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return what changed between two sets of samples, given as digests by id: samples that differ, are missing or are new."""
    problems = [f"{name} has different content" for name, digest in before.items() if name in after and after[name] != digest]
    problems += [f"{name} is missing" for name in before if name not in after]
    return problems + [f"{name} is new" for name in after if name not in before]
