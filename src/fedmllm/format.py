"""Formats sizes and durations for people."""

from __future__ import annotations

import math


def byte_unit(count: float) -> tuple[float, str]:
    """Return the largest decimal unit in which the size is at least 1: its number of bytes and its name."""
    power = min(int(math.log10(max(count, 1) * (1 + 5e-4)) // 3), 4)
    return 1000.0**power, ("B", "kB", "MB", "GB", "TB")[power]


def human_bytes(count: float) -> str:
    """Format a size with three digits in decimal units, e.g. ``1.25 MB``."""
    scale, unit = byte_unit(count)
    value = count / scale
    digits = 0 if scale == 1 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """Format a duration, e.g. ``4.2 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
