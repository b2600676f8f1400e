"""Caches what several runs in one process share: model, image features, data and encoded samples."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fedmllm.config import Experiment
from fedmllm.data.datasets.base import Dataset
from fedmllm.data.federated import load
from fedmllm.data.fingerprint import folder_key
from fedmllm.models.features import VisionFeatures, serves
from fedmllm.models.last_layer import lengthen, shorten
from fedmllm.models.load import VisionLanguageModel, choose_device, load_model
from fedmllm.models.lora import attach_lora, detach_lora
from fedmllm.models.parts import Part, parts
from fedmllm.models.source import model_source
from fedmllm.training.batches import Encoder

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_KEPT = 4
"""Maximum number of cached datasets, and of cached encoders. Only one model is cached."""


class Resident:
    """Caches recently used models, datasets and encoders.

    A run with these caches gives bit-identical results, and several runs in a row are faster.
    """

    def __init__(self) -> None:
        self._models: OrderedDict[str, VisionLanguageModel] = OrderedDict()
        self._datasets: OrderedDict[str, Dataset] = OrderedDict()
        self._encoders: OrderedDict[str, Encoder] = OrderedDict()

    def dataset(self, experiment: Experiment) -> Dataset:
        """Return the samples before they are divided among clients. Changed files are loaded again."""
        key = _key(experiment, "data") + folder_key(*experiment.data.sources)
        return _held(self._datasets, _KEPT, key, lambda: load(experiment.data, experiment.seed))

    def encoder(self, experiment: Experiment) -> Encoder:
        """Return the encoder of a model and wording. It serves all datasets and splits, because it identifies samples by their content."""
        plain, wording = self._plain(experiment), experiment.data.wording
        return _held(self._encoders, _KEPT, f"{wording} {plain.features is None}", lambda: Encoder(plain, wording))

    @contextmanager
    def model(self, experiment: Experiment) -> Iterator[tuple[VisionLanguageModel, list[Part]]]:
        """Yield the model with fresh adapters, and its trainable parts. The adapters are detached at the end of the ``with`` block."""
        plain = self._plain(experiment)
        trainable = parts(plain.model, plain.family, experiment.lora)
        vlm = attach_lora(plain, experiment.lora, experiment.seed)
        try:
            if experiment.engine.answers_only:
                shorten(vlm.model)
            yield vlm, trainable
        finally:
            lengthen(vlm.model)
            detach_lora(vlm)

    def _plain(self, experiment: Experiment) -> VisionLanguageModel:
        """Return the model without adapters. It has no feature cache if the parts that compute the features train."""
        source = folder_key(Path(model_source(experiment.model.name)))
        key = _key(experiment, "model") + f"{experiment.engine.device} {experiment.engine.feature_bytes} {source}"
        if key not in self._models:
            # Encoders hold references to their model and to its features, which would keep both in memory.
            self._encoders.clear()
        vlm = _held(self._models, 1, key, lambda: _loaded(experiment))
        return vlm if experiment.lora.connector == "frozen" else replace(vlm, features=None)


def _loaded(experiment: Experiment) -> VisionLanguageModel:
    """Load the model without adapters."""
    vlm = load_model(experiment.model, choose_device(experiment.engine.device))
    if not experiment.engine.feature_bytes:
        return vlm
    if serves(vlm):
        return replace(vlm, features=VisionFeatures(vlm, experiment.engine.feature_bytes))
    _LOG.warning("model.name: %r does not support cached image features; its vision model runs in every pass", vlm.name)
    return vlm


def _key(experiment: Experiment, *sections: str) -> str:
    """Return the settings in some sections as a cache key; the data also depend on the seed."""
    return experiment.model_dump_json(include={*sections, "seed"} if "data" in sections else set(sections))


def _held(kept: OrderedDict[str, T], count: int, key: str, make: Callable[[], T]) -> T:
    """Return the cached value of a key, or create it. The least recently used values are dropped before the new one is created."""
    if key not in kept:
        while len(kept) >= count:
            kept.popitem(last=False)
        kept[key] = make()
    kept.move_to_end(key)
    return kept[key]
