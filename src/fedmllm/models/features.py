"""Caches the frozen vision tower's features, so that they are computed once per image."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedmllm.errors import ModelError
from fedmllm.models.families.generic import decoder_modules, without_adapters
from fedmllm.models.feature_store import TensorStore
from fedmllm.models.load import VisionLanguageModel

if TYPE_CHECKING:
    from fedmllm.models.encoding import Encoded

_LOG = logging.getLogger(__name__)

_FIELDS = ("pooler_output", "deepstack_features")
"""The fields of ``get_image_features`` outputs that decoders read: features by image, and features by inner layer and image."""


class VisionFeatures:
    """A cache of bounded size for the outputs of a model's ``get_image_features``, which the model gets instead of pixels.

    Nothing between pixels and decoder trains, so the features never change. The cache key is computed from the processor's output, so an
    edited copy of an image counts as another image.

    Args:
        vlm: a model that ``serves`` accepts, before or after adapters are attached to its decoder.
        max_bytes: size limit of the cache.

    Raises:
        ModelError: if the model does not accept features. It would train without its images.
    """

    def __init__(self, vlm: VisionLanguageModel, max_bytes: int) -> None:
        if not serves(vlm):
            raise ModelError(f"model.name: {vlm.name!r} does not accept image features instead of images; set engine.feature_bytes to 0")
        self._vlm, self._store = vlm, TensorStore(max_bytes)
        # Some outer methods forward all arguments to the inner model, and only its signature names them.
        outer = without_adapters(vlm.model)
        methods = [model.get_image_features for model in (outer, getattr(outer, "model", outer)) if hasattr(model, "get_image_features")]
        self._taken = frozenset(name for method in methods for name in inspect.signature(method).parameters)
        inside = decoder_modules(outer)
        self._outside = [module for module in outer.modules() if id(module) not in inside]
        self._kind: Any = None
        self._crowded = False
        self._lock = threading.Lock()

    def standing_for(self, sample: Encoded, again: Callable[[], Encoded]) -> Encoded:
        """Compute and cache the features of a sample's images, and return the sample without pixels.

        A sample without images, or whose features do not fit into the cache, is returned unchanged.

        Args:
            sample: the encoded sample.
            again: encodes the sample again. It is called if the cache has evicted the features by the time they are needed.
        """
        if not sample.pictured or sample.left_out is not None:
            return sample
        self._features(sample)
        return sample.without_pixels(lambda: again().extras) if sample.picture in self._store else sample

    def inputs(self, samples: Sequence[Encoded]) -> dict[str, Any]:
        """Return the arguments of ``forward`` that replace the pixels of samples. Every sample must have an image."""
        rows = [self._features(sample) for sample in samples]
        merged = {field: _merged([_grown(row, field) for row in rows]) for field in _FIELDS if any(n.startswith(field) for n in rows[0])}
        return {"mm_encoder_outputs": {"image": self._kind(**merged)}}

    @torch.no_grad()
    def _features(self, sample: Encoded) -> dict[str, Tensor]:
        with self._lock:
            found = self._store.get(sample.picture)
            if found is None:
                self._tell_if_crowded(sample)
                found = self._computed({name: tensor for name, tensor in sample.whole.items() if name in self._taken})
                self._store.put(sample.picture, found)
        return {name: tensor.to(self._vlm.device) for name, tensor in found.items()}

    def _tell_if_crowded(self, sample: Encoded) -> None:
        """Log a warning the first time that evicted features must be computed again."""
        if sample.left_out is not None and not self._crowded:
            self._crowded = True
            _LOG.warning(
                "engine.feature_bytes holds the features of %d images, fewer than are in use, so images are read and their features computed "
                "again; raise it",
                len(self._store),
            )

    def _computed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        training = [module for module in self._outside if module.training]
        for module in training:
            module.training = False
        with self._vlm.autocast():
            output = self._vlm.model.get_image_features(
                **{name: tensor.to(self._vlm.device) for name, tensor in tensors.items()}, return_dict=True
            )
        for module in training:
            module.training = True
        self._kind = type(output)
        return dict(leaf for field in _FIELDS for leaf in _leaves(field, getattr(output, field, None)))


def serves(vlm: VisionLanguageModel) -> bool:
    """Return whether a model accepts precomputed image features instead of pixels."""
    model = without_adapters(vlm.model)
    return hasattr(model, "get_image_features") and "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def _leaves(name: str, tree: Any) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors of nested lists with their paths: ``pooler_output/0``, ``pooler_output/1``."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif tree is not None:
        for i, branch in enumerate(tree):
            yield from _leaves(f"{name}/{i}", branch)


def _grown(leaves: Mapping[str, Tensor], name: str) -> Any:
    """Rebuild the nested lists from the output of ``_leaves``."""
    if name in leaves:
        return leaves[name]
    branches = dict.fromkeys(path[len(name) + 1 :].split("/")[0] for path in leaves if path.startswith(f"{name}/"))
    return [_grown(leaves, f"{name}/{branch}") for branch in branches]


def _merged(trees: Sequence[Any]) -> Any:
    """Concatenate the samples' features: tensors along their first axis, lists of images as one list, and lists of layers layer by layer."""
    if isinstance(trees[0], Tensor):
        return torch.cat(list(trees))
    if isinstance(trees[0][0], Tensor):
        return [picture for tree in trees for picture in tree]
    return [_merged([tree[layer] for tree in trees]) for layer in range(len(trees[0]))]
