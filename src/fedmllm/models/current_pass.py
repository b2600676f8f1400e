"""What holds for the pass of a model that a thread is making: whose adapters, and how much of the output is read."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Factors = Mapping[nn.Module, tuple[Tensor, Tensor]]
"""Stacked adapters by layer: A of shape (groups, r, inputs) and B of shape (groups, outputs, r)."""


class _Pass(threading.local):
    """One for each thread."""

    factors: Factors | None = None
    """None for the model's own adapters."""
    columns: int | None = None
    """At the end of each row, that are read; None for all."""
    length: int = 0
    """Columns there are, while some are cut off."""


PASS = _Pass()


@contextmanager
def passing(**settings: Any) -> Iterator[None]:
    """In this block these settings hold for this thread's passes."""
    before = {name: getattr(PASS, name) for name in settings}
    vars(PASS).update(settings)
    try:
        yield
    finally:
        vars(PASS).update(before)
