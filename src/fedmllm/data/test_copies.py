"""Copies of the test split with less or worse content: what a model is worth where a modality is missing when it is used.

A copy is written ``image`` or ``text`` (only this modality is left; several are joined by ``+``), or as a part of ``quality``,
e.g. ``blur-1``. Trained scenario times tested copy gives the matrix in which a method's robustness shows.
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
    """The text, if it can name a copy.

    Raises:
        ConfigError: if it is neither modalities joined by ``+`` nor a part.
    """
    if _part(spec) is None and not re.fullmatch(r"[a-z_]+(\+[a-z_]+)*", spec):
        raise ConfigError(f"{spec!r}: a copy of the test split is named by modalities (image, image+text) or a part (blur-1)")
    return spec


def reduced_copy(samples: Sequence[Sample], spec: str, seed: int) -> tuple[Sample, ...]:
    """The samples as ``spec`` leaves them, under ids of their own; samples left with nothing are not asked.

    Raises:
        DataError: if none is left.
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
    """Test samples such as a client meets: drawn with the frequencies of its categories, each left with the modalities of one of its own.

    Args:
        test: the shared test split.
        held: the client's training samples; none of them is asked.
        client: names the draw.
        count: samples to draw, without replacement; more where rounding gives each category at least one, fewer where the split has fewer.
        seed: the experiment's.

    Returns:
        The samples under ids of their own, category by category; empty if the test split holds none of the client's categories.
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
    """The part that a copy is named after, if it is one."""
    return parse_part(spec) if re.split("[-:@]", spec)[0] in PARTS else None
