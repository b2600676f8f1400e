"""Counts of answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from fedmllm.types import Sample


def answer_counts(samples: Iterable[Sample]) -> dict[str, dict[str, int]]:
    """Count how often each answer occurs, by the set of options that it was chosen from (``options_key``). Free answers are not counted."""
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        if sample.options:
            counts.setdefault(options_key(sample.options), Counter())[sample.answer] += 1
    return {options: dict(sorted(found.items())) for options, found in sorted(counts.items())}


def options_key(options: Sequence[str]) -> str:
    """Return a key for a set of options that does not depend on their order and can be used in JSON."""
    return json.dumps(sorted(options))
