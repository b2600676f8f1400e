"""Per-thread settings of the current pass through a model: which adapters it uses, and which output columns are read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Factors = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""Stacked adapters by layer: A of shape (groups, r, inputs) and B of shape (groups, outputs, r)."""


class _Pass(threading.local):
    """The settings of one thread."""

    factors: Factors | None = None
    """Clients' stacked adapters; None for the model's own adapters."""
    columns: int | None = None
    """Number of columns at the end of each row that are read; None for all."""
    length: int = 0
    """Total number of columns, while some are cut off."""


PASS = _Pass()


@contextmanager
def passing(**settings: Any) -> Iterator[None]:
    """Apply settings to this thread's passes in this block."""
    before = {name: getattr(PASS, name) for name in settings}
    vars(PASS).update(settings)
    try:
        yield
    finally:
        vars(PASS).update(before)
