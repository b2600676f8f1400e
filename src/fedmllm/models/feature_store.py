"""A cache of tensors in a memory-mapped file of bounded size, so that they need neither be recomputed nor held in memory."""

from __future__ import annotations

import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import IO

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


@dataclass(frozen=True)
class _Entry:
    """The position of a group of tensors in the file, and its layout: (name, dtype, shape, bytes) of each tensor in order."""

    start: int
    layout: tuple[tuple[str, torch.dtype, torch.Size, int], ...]


class TensorStore:
    """Groups of named tensors in a temporary file that is deleted when the process ends. New groups evict the oldest ones.

    The file is a ring buffer: groups are written one after another and wrap around at the end. The operating system keeps frequently read
    groups in memory. ``TMPDIR`` determines the location of the file. If the disk is full, nothing more is cached, and the run continues.

    Args:
        max_bytes: maximum size of the file, which occupies disk space only as it fills. Larger groups are not cached.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._end = 0
        self._full = False

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> dict[str, Tensor] | None:
        """Return a copy of a group; None if it was never stored or has been evicted."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        found, at = {}, entry.start
        for name, dtype, shape, size in entry.layout:
            # An empty byte tensor cannot be viewed as another data type.
            found[name] = (
                torch.from_numpy(self._mapped[at : at + size].copy()).view(dtype).reshape(shape)
                if size
                else torch.empty(shape, dtype=dtype)
            )
            at += _aligned(size)
        return found

    def put(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Store a group, unless its key is already in use."""
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        size = sum(_aligned(tensor.nbytes) for tensor in held.values())
        if self._full or size > self._max_bytes or key in self._entries:
            return
        start = self._end if self._end + size <= self._max_bytes else 0
        self._make_room(start, start + size)
        layout = tuple((name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in held.items())
        try:
            self._write(start, held)
        except OSError:
            self._full = True
            return
        self._entries[key] = _Entry(start, layout)
        self._end = start + size

    def _write(self, start: int, tensors: Mapping[str, Tensor]) -> None:
        """Write with system calls. Writing through the memory map would crash with a bus error if the disk is full."""
        for tensor in tensors.values():
            self._file.seek(start)
            if tensor.nbytes:
                self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            start += _aligned(tensor.nbytes)

    def _make_room(self, start: int, end: int) -> None:
        """Evict the oldest groups that overlap the new one, or that lie beyond the point where the ring wraps around."""
        skipped = self._end if start < self._end else self._max_bytes
        while self._entries:
            oldest = next(iter(self._entries.values())).start
            if not (start <= oldest < end or oldest >= skipped):
                return
            self._entries.popitem(last=False)

    @cached_property
    def _file(self) -> IO[bytes]:
        file = tempfile.TemporaryFile(prefix="fedmllm-", buffering=0)  # noqa: SIM115
        weakref.finalize(self, file.close)
        file.truncate(self._max_bytes)
        return file

    @cached_property
    def _mapped(self) -> np.ndarray:
        return np.memmap(self._file, dtype=np.uint8, mode="r", shape=(self._max_bytes,))


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
