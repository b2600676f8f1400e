"""Measures where the time of a round goes."""

from __future__ import annotations

import time


class Watch:
    """Measures seconds by activity. A round writes its checkpoint after its metrics line, so the next round's line includes that time."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds = dict.fromkeys(("train", "aggregate", "evaluate", "checkpoint"), 0.0)

    def reset(self) -> dict[str, float]:
        """Return the seconds by activity and restart them at zero."""
        before, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return before

    def lap(self, name: str) -> None:
        """Add the time since the last lap to an activity."""
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now
