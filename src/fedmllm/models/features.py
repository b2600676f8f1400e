"""What the frozen vision part makes of pictures, computed once for each."""

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
"""What decoders read of an output of ``get_image_features``: features by picture, and by inner layer and picture."""


class VisionFeatures:
    """Outputs of a model's ``get_image_features``, kept up to a limit and fed in place of pictures.

    Between pictures and decoder nothing trains, so that the features never change. They are kept by the tensors that the processor
    made, so that a blurred copy of a picture is another picture.

    Args:
        vlm: a model that ``serves``, before or after adapters were attached to its decoder.
        max_bytes: how much to keep.

    Raises:
        ModelError: if the model does not read features: it would train without its pictures.
    """

    def __init__(self, vlm: VisionLanguageModel, max_bytes: int) -> None:
        if not serves(vlm):
            raise ModelError(f"model.name: {vlm.name!r} reads no features in place of pictures; set engine.feature_bytes to 0")
        self._vlm, self._store = vlm, TensorStore(max_bytes)
        # Some models' hand all on to that of the model inside, whose signature alone says what that is.
        outer = without_adapters(vlm.model)
        methods = [model.get_image_features for model in (outer, getattr(outer, "model", outer)) if hasattr(model, "get_image_features")]
        self._taken = frozenset(name for method in methods for name in inspect.signature(method).parameters)
        inside = decoder_modules(outer)
        self._outside = [module for module in outer.modules() if id(module) not in inside]
        self._kind: Any = None
        self._crowded = False
        self._lock = threading.Lock()

    def standing_for(self, sample: Encoded, again: Callable[[], Encoded]) -> Encoded:
        """The sample without its pixels, once the features of its pictures are kept; as it is where they cannot be, or it has none.

        Args:
            sample: encoded.
            again: encodes it once more, should its features have made room for others when they are needed.
        """
        if not sample.pictured or sample.left_out is not None:
            return sample
        self._features(sample)
        return sample.without_pixels(lambda: again().extras) if sample.picture in self._store else sample

    def inputs(self, samples: Sequence[Encoded]) -> dict[str, Any]:
        """What ``forward`` takes in place of the pixels of some samples, each of which has a picture."""
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
        """Say it the first time that features are computed again."""
        if sample.left_out is not None and not self._crowded:
            self._crowded = True
            _LOG.warning(
                "engine.feature_bytes holds the features of %d pictures, which is less than are in use: pictures are read and their features "
                "computed again; raise it",
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
    """Whether a model can be fed features in place of pictures."""
    model = without_adapters(vlm.model)
    return hasattr(model, "get_image_features") and "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def _leaves(name: str, tree: Any) -> Iterable[tuple[str, Tensor]]:
    """``pooler_output/0``, ``pooler_output/1``: the tensors of nested lists by their paths."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif tree is not None:
        for i, branch in enumerate(tree):
            yield from _leaves(f"{name}/{i}", branch)


def _grown(leaves: Mapping[str, Tensor], name: str) -> Any:
    """The opposite of ``_leaves``."""
    if name in leaves:
        return leaves[name]
    branches = dict.fromkeys(path[len(name) + 1 :].split("/")[0] for path in leaves if path.startswith(f"{name}/"))
    return [_grown(leaves, f"{name}/{branch}") for branch in branches]


def _merged(trees: Sequence[Any]) -> Any:
    """The samples' pictures behind one another: tensors along their first axis, lists of pictures as one list, by layer where there are."""
    if isinstance(trees[0], Tensor):
        return torch.cat(list(trees))
    if isinstance(trees[0][0], Tensor):
        return [picture for tree in trees for picture in tree]
    return [_merged([tree[layer] for tree in trees]) for layer in range(len(trees[0]))]
