"""The embedded datasets: small counterparts of the benchmark's datasets, generated from real handwritten digits and text.

The four tasks use the same kind of image and are generated from the seed. Because the generator is known, so are the best
possible scores from the image alone, the text alone and both (``ceilings``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from fedmllm.data.datasets.base import Dataset, DatasetRequest
from fedmllm.data.datasets.digits import claims, triage, vqa
from fedmllm.data.datasets.digits.scans import Split
from fedmllm.randomness import generator
from fedmllm.types import Modality, Sample

NUM_TRAIN, NUM_TEST = 1600, 400


@dataclass(frozen=True)
class _Task:
    generate: Callable[[int, Split, np.random.Generator], Sample]
    ceilings: Callable[[], Mapping[str, float]]
    metric: str
    modalities: tuple[Modality, ...]


_TASKS = {
    "digits-claims": _Task(claims.generate, claims.ceilings, "auc", ("image", "text")),
    "digits-triage": _Task(triage.generate, triage.ceilings, "macro_f1", ("image", "text")),
    "digits-vqa": _Task(vqa.generate_vqa, vqa.vqa_ceilings, "accuracy", ("image",)),
    "digits-cards": _Task(vqa.generate_card, vqa.card_ceilings, "accuracy", ("text",)),
}


def loader(name: str) -> Callable[[DatasetRequest], Dataset]:
    """Return the loader of one task. Sample i of a split depends only on the seed and i, not on the number of samples."""

    def load(request: DatasetRequest) -> Dataset:
        task = _TASKS[name]

        def draw(split: Split, count: int) -> tuple[Sample, ...]:
            return tuple(task.generate(i, split, generator(request.seed, name, split, i)) for i in range(count))

        train = draw("train", NUM_TRAIN if request.num_train is None else request.num_train)
        test = draw("test", NUM_TEST if request.num_test is None else request.num_test)
        validation = draw("validation", len(test) if request.num_validation is None else request.num_validation)
        return Dataset(name, task.metric, train, test, task.modalities, task.ceilings(), validation=validation)

    return load


def wordings(seed: int, count: int) -> Iterator[Sample]:
    """Yield samples of the four tasks in rotation, for training a tokenizer on their words."""
    for i in range(count):
        name = list(_TASKS)[i % len(_TASKS)]
        yield _TASKS[name].generate(i, "train", generator(seed, "wordings", i))
