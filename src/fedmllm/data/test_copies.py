"""Copies of the test split with missing or corrupted content, which measure a model's robustness at test time.

A copy is named by the modalities that it keeps (``image``, ``text``, or several joined by ``+``), or by a corruption of ``quality``,
e.g. ``blur-1``. Training scenarios times test copies form the matrix that shows a method's robustness.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fedmllm.data.modalities import keep_only
from fedmllm.data.quality import PARTS, Part, parse_part
from fedmllm.errors import ConfigError, DataError
from fedmllm.randomness import generator
from fedmllm.types import Sample


def check_copy(spec: str) -> str:
    """Return the name of a copy after checking it.

    Raises:
        ConfigError: if it is neither modalities joined by ``+`` nor a corruption.
    """
    if _part(spec) is None and not re.fullmatch(r"[a-z_]+(\+[a-z_]+)*", spec):
        raise ConfigError(f"{spec!r}: a copy of the test split is named by modalities (image, image+text) or a corruption (blur-1)")
    return spec


def reduced_copy(samples: Sequence[Sample], spec: str, seed: int) -> tuple[Sample, ...]:
    """Return the samples changed as ``spec`` says, with new ids. Samples left without content are removed.

    Raises:
        DataError: if no sample is left.
    """
    part = _part(spec)
    copied = part("test", samples, seed) if part else [keep_only(sample, spec.split("+")) for sample in samples]
    left = tuple(replace(sample, id=f"{sample.id}@{spec}") for sample in copied if sample.content)
    if not left:
        raise DataError(
            f"evaluation.tested: {spec} leaves no test sample any content; the samples hold {' and '.join(samples[0].modalities)}"
        )
    return left


def own_kind(test: Sequence[Sample], held: Sequence[Sample], client: str, count: int, seed: int) -> tuple[Sample, ...]:
    """Draw test samples that resemble a client's data: with its frequencies of categories, and with the modalities of its samples.

    Args:
        test: the shared test split.
        held: the client's training samples. Only their categories and modalities are used.
        client: the client's id, which keys the random draw.
        count: number of samples to draw, without replacement. There may be more because every category gets at least one, or fewer if
            the test split has too few of a category.
        seed: the experiment's seed.

    Returns:
        the samples with new ids, ordered by category; empty if the test split has none of the client's categories.
    """
    rng = generator(seed, "own-kind", client)
    shares = Counter((sample.domain, sample.category) for sample in held)
    drawn = []
    for kind, number in sorted(shares.items()):
        found = [sample for sample in test if (sample.domain, sample.category) == kind]
        wanted = min(len(found), max(1, round(count * number / len(held))))
        drawn += [found[i] for i in sorted(rng.choice(len(found), size=wanted, replace=False))]
    held_by = [held[i].modalities for i in rng.integers(len(held), size=len(drawn))]
    kept = (keep_only(sample, modalities) for sample, modalities in zip(drawn, held_by, strict=True))
    return tuple(replace(sample, id=f"{sample.id}@{client}") for sample in kept if sample.content)


def _part(spec: str) -> Part | None:
    """Return the corruption that a copy is named after; None if it is named after modalities."""
    return parse_part(spec) if re.split("[-:@]", spec)[0] in PARTS else None
