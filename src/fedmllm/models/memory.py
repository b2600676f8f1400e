"""How many tokens may go through a model at once, and how many clients may train side by side."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import trainable

_LOG = logging.getLogger(__name__)

CPU_TOKENS = 1536
"""On a CPU more gain nothing: its products are as fast as they get, and what is kept for the gradient leaves its caches."""
_SHARE = 0.6
"""Of a GPU's free memory; the rest is for fragmentation, and for what kernels take besides their results."""
OPTIMIZED_BYTES = 16
"""Of a trained parameter in float32: itself, its gradient, AdamW's two means."""
_CLIENTS_SHARE = 0.2
"""Of a GPU's free memory for what clients of a wave train."""


def clients_at_once(vlm: VisionLanguageModel) -> int | None:
    """How many clients' tensors fit beside one another on a GPU: ``0.2 * free bytes / (16 * trained parameters)``; None elsewhere."""
    if vlm.device.type != "cuda":
        return None
    trained = sum(parameter.numel() for _, parameter in trainable(vlm.model))
    return max(1, int(_CLIENTS_SHARE * _free_bytes(vlm.device) / (OPTIMIZED_BYTES * trained)))


class TokenBudget:
    """Padded tokens of a training pass: as many as are set, or as suit the device; half as many after each pass that did not fit.

    It is measured once, for as long as the same model trains with the same settings.

    Args:
        fixed: tokens; None to measure.

    Attributes:
        tokens: of a pass; None until measured.
        halvings: how often passes did not fit.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.tokens, self.halvings = fixed, 0

    def measure(self, device: torch.device, length: int, work: Callable[[], object]) -> None:
        """Settle the tokens of a pass, unless they are settled.

        On a GPU ``0.6 * free bytes / bytes per token``, by what one sample's pass holds at its height; elsewhere ``CPU_TOKENS``.

        Args:
            device: the model's.
            length: tokens of the sample, the longest there is.
            work: its pass, forward and backward, in the mode in which the model trains.
        """
        if self.tokens is None and device.type != "cuda":
            self.tokens = CPU_TOKENS
        elif self.tokens is None:
            needed = peak_bytes(work)
            release(device)
            self.tokens = max(1, int(_SHARE * _free_bytes(device) * length / needed))

    def halve(self, tokens: int, reason: str) -> None:
        """After a pass that did not fit the memory.

        Args:
            tokens: of that pass, padding included.
            reason: what the allocator said.
        """
        self.halvings += 1
        self.tokens = max(1, tokens // 2)
        _LOG.warning(
            "a pass of %d tokens did not fit the memory (%s); passes have %d at most from here on, which training.max_batch_tokens can set "
            "from the beginning",
            *(tokens, reason, self.tokens),
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, within one of its libraries, or on a CPU."""
    text = str(error).lower()
    words = ("out of memory", "alloc_failed", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words))


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    """What the driver has left, and what PyTorch holds without using it."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes alive at once of what some work allocates: what a pass keeps for the gradient, and what it needs on the way.

    Each operation's results are followed until they are freed, so that layers that are computed again count with what they need then.
    What a kernel allocates for itself is not seen.
    """
    with Alive() as alive:
        work()
    peak: int = alive.peak
    return peak


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In this block the storages of operations' results are added up while they live.

    Attributes:
        now: bytes that live.
        peak: the most that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for storage in _storages(results):
            if storage._cdata not in given:
                self._follow(storage)
        return results

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of all tensors among arguments or results."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
