"""Tensors by key in a memory-mapped file of bounded size: what was computed once need not be computed again, nor held in memory."""

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
    """Where a group of tensors lies, and how to read it: (name, dtype, shape, bytes) in their order."""

    start: int
    layout: tuple[tuple[str, torch.dtype, torch.Size, int], ...]


class TensorStore:
    """Groups of named tensors in a temporary file that is gone when the process ends. The oldest make room for new ones.

    The file is a ring: groups lie one behind the other and begin again at the front when they reach the end. What is read often
    the operating system keeps in memory. ``TMPDIR`` says where the file is; a full disk ends the keeping, not the run.

    Args:
        max_bytes: size of the file, taken up as it fills; a group that is larger is not kept.
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
        """A copy of a group; None if it is not there, or no longer."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        found, at = {}, entry.start
        for name, dtype, shape, size in entry.layout:
            # An empty tensor of bytes cannot be viewed as another format.
            found[name] = (
                torch.from_numpy(self._mapped[at : at + size].copy()).view(dtype).reshape(shape)
                if size
                else torch.empty(shape, dtype=dtype)
            )
            at += _aligned(size)
        return found

    def put(self, key: Hashable, tensors: Mapping[str, Tensor]) -> None:
        """Keep a group under a key that has none."""
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
        """By a system call rather than through the map, where a full disk would be a bus error."""
        for tensor in tensors.values():
            self._file.seek(start)
            if tensor.nbytes:
                self._file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            start += _aligned(tensor.nbytes)

    def _make_room(self, start: int, end: int) -> None:
        """Forget the oldest groups as far as they lie where the new one will, or behind the point where the ring begins again."""
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
