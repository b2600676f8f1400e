"""How often each answer occurs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from fedmllm.types import Sample


def answer_counts(samples: Iterable[Sample]) -> dict[str, dict[str, int]]:
    """How often each answer occurs, by the set of options it was chosen from (``options_key``); free answers are not counted."""
    counts: dict[str, Counter[str]] = {}
    for sample in samples:
        if sample.options:
            counts.setdefault(options_key(sample.options), Counter())[sample.answer] += 1
    return {options: dict(sorted(found.items())) for options, found in sorted(counts.items())}


def options_key(options: Sequence[str]) -> str:
    """A set of options, whatever their order, as a key that fits into JSON."""
    return json.dumps(sorted(options))
