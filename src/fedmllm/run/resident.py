"""What runs of one process have in common and need only once: model, features of pictures, data and encoded samples."""

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
from fedmllm.models.load import VisionLanguageModel, choose_device, load_model, model_source
from fedmllm.models.lora import attach_lora, detach_lora
from fedmllm.models.parts import Part, parts
from fedmllm.training.batches import Encoder

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_KEPT = 4
"""Data sets, and encoders of as many wordings. Of models one is kept."""


class Resident:
    """Holds on to what was used last. A run in it ends bit for bit as it does alone; several one after another are faster."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, VisionLanguageModel] = OrderedDict()
        self._datasets: OrderedDict[str, Dataset] = OrderedDict()
        self._encoders: OrderedDict[str, Encoder] = OrderedDict()

    def dataset(self, experiment: Experiment) -> Dataset:
        """The samples before they are spread, as their files are now."""
        key = _key(experiment, "data") + folder_key(*experiment.data.sources)
        return _held(self._datasets, _KEPT, key, lambda: load(experiment.data, experiment.seed))

    def encoder(self, experiment: Experiment) -> Encoder:
        """Encoded samples of whatever data and split: an encoder tells samples apart by what they hold."""
        plain, wording = self._plain(experiment), experiment.data.wording
        return _held(self._encoders, _KEPT, f"{wording} {plain.features is None}", lambda: Encoder(plain, wording))

    @contextmanager
    def model(self, experiment: Experiment) -> Iterator[tuple[VisionLanguageModel, list[Part]]]:
        """In this block the model with fresh adapters, and what of it could train."""
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
        """The model without adapters, as its files are now; without features where what makes them trains."""
        source = folder_key(Path(model_source(experiment.model.name)))
        key = _key(experiment, "model") + f"{experiment.engine.device} {experiment.engine.feature_bytes} {source}"
        if key not in self._models:
            # They hold on to the model that they encode for, and to features that would go with it.
            self._encoders.clear()
        vlm = _held(self._models, 1, key, lambda: _loaded(experiment))
        return vlm if experiment.lora.connector == "frozen" else replace(vlm, features=None)


def _loaded(experiment: Experiment) -> VisionLanguageModel:
    """The model without adapters."""
    vlm = load_model(experiment.model, choose_device(experiment.engine.device))
    if not experiment.engine.feature_bytes:
        return vlm
    if serves(vlm):
        return replace(vlm, features=VisionFeatures(vlm, experiment.engine.feature_bytes))
    _LOG.warning("model.name: %r reads no features in place of pictures, so that its vision part computes in every pass", vlm.name)
    return vlm


def _key(experiment: Experiment, *sections: str) -> str:
    """The settings on which something depends, the seed among them."""
    return experiment.model_dump_json(include={*sections, "seed"} if "data" in sections else set(sections))


def _held(kept: OrderedDict[str, T], count: int, key: str, make: Callable[[], T]) -> T:
    """What is kept under a key, made if it is not there; the least recently used leaves first, before anything new is made."""
    if key not in kept:
        while len(kept) >= count:
            kept.popitem(last=False)
        kept[key] = make()
    kept.move_to_end(key)
    return kept[key]
