"""Memory limits: how many tokens fit in one training pass, and how many clients can train in parallel."""

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
"""Tokens per pass on a CPU. Larger passes are not faster, and the activations stored for the gradient no longer fit into the caches."""
_SHARE = 0.6
"""Share of a GPU's free memory used for a pass. The rest is for fragmentation and for the kernels' own temporary memory."""
OPTIMIZED_BYTES = 16
"""Bytes per trained parameter in float32: the parameter, its gradient, and AdamW's two moments."""
_CLIENTS_SHARE = 0.2
"""Share of a GPU's free memory used for the trainable tensors of parallel clients."""
_ROWS_SHARE = 0.2
"""Share of a GPU's free memory used for the rows' own copies of the trainable tensors."""
CPU_ROWS_BYTES = 1 << 30
"""Memory on a CPU for the same."""


def clients_at_once(vlm: VisionLanguageModel) -> int | None:
    """Return how many clients can train in parallel on a GPU: ``0.2 * free bytes / (16 * trained parameters)``. None on other devices."""
    if vlm.device.type != "cuda":
        return None
    trained = sum(parameter.numel() for _, parameter in trainable(vlm.model))
    return max(1, int(_CLIENTS_SHARE * _free_bytes(vlm.device) / (OPTIMIZED_BYTES * trained)))


def rows_at_once(vlm: VisionLanguageModel, threads: int = 1) -> int:
    """Return how many rows of a pass can have their own copy of the trainable tensors, each with a gradient.

    It is ``limit / (threads * 2 * bytes of the trainable tensors)``, where the limit is 1 GiB on a CPU and 0.2 of a GPU's free memory.

    Args:
        vlm: the model.
        threads: number of passes that run at the same time.
    """
    limit = _ROWS_SHARE * _free_bytes(vlm.device) if vlm.device.type == "cuda" else CPU_ROWS_BYTES
    row = 2 * sum(parameter.nbytes for _, parameter in trainable(vlm.model))
    return max(1, int(limit / (threads * row)))


class TokenBudget:
    """The maximum number of tokens in a training pass, padding included. It is halved after each pass that does not fit into memory.

    The budget is measured once per model and training settings, unless it is fixed.

    Args:
        fixed: the number of tokens; None to measure it.

    Attributes:
        tokens: tokens per pass; None until measured.
        halvings: number of passes that did not fit.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self.tokens, self.halvings = fixed, 0

    def measure(self, device: torch.device, length: int, work: Callable[[], object]) -> None:
        """Determine the number of tokens per pass, unless it is known.

        On a GPU it is ``0.6 * free bytes / bytes per token``, measured by the peak memory of one sample's pass. On other devices it is
        ``CPU_TOKENS``.

        Args:
            device: the model's device.
            length: number of tokens of the longest sample.
            work: runs the forward and backward pass of that sample in training mode.
        """
        if self.tokens is None and device.type != "cuda":
            self.tokens = CPU_TOKENS
        elif self.tokens is None:
            needed = peak_bytes(work)
            release(device)
            self.tokens = max(1, int(_SHARE * _free_bytes(device) * length / needed))

    def halve(self, tokens: int, reason: str) -> None:
        """Set the budget to half of a pass that did not fit into memory.

        Args:
            tokens: tokens of that pass, padding included.
            reason: the allocator's message.
        """
        self.halvings += 1
        self.tokens = max(1, tokens // 2)
        _LOG.warning(
            "a pass of %d tokens did not fit into memory (%s); later passes have at most %d tokens; set training.max_batch_tokens to start with "
            "this limit",
            *(tokens, reason, self.tokens),
        )


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed memory allocation, on a GPU, in a GPU library, or on a CPU."""
    text = str(error).lower()
    words = ("out of memory", "alloc_failed", "can't allocate memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words))


def release(device: torch.device) -> None:
    """Free memory that is no longer referenced, including PyTorch's GPU cache."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _free_bytes(device: torch.device) -> int:
    """Return the memory that the driver reports as free plus the unused part of PyTorch's cache, in bytes."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak memory of the tensors that a function allocates, in bytes.

    The results of each operation count until they are freed, so gradient checkpointing is accounted for. The temporary memory of
    kernels is not included.
    """
    with Alive() as alive:
        work()
    peak: int = alive.peak
    return peak


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the memory of operations' results in this block until they are freed.

    Attributes:
        now: bytes currently in use.
        peak: maximum number of bytes in use at once.
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
    """Return the storages of all tensors in nested arguments or results."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
