"""What a stage works with: the device, how large models are, how much time is left, and where rows go."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass
class Bench:
    """One stage's.

    Attributes:
        stage: its name, in every row.
        rows: the file that rows are added to.
        device: where models are.
        tiny: models of a few thousand parameters, short samples and single repeats, to try the script.
        seconds: until the stage is ended.
    """

    stage: str
    rows: Path
    device: torch.device
    tiny: bool = False
    seconds: float = 60.0
    _begun: float = field(default_factory=time.monotonic)

    def row(self, name: str, **values: Any) -> None:
        """Add a row, at once: whatever comes after may be cut off."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, "name": name, **values}) + "\n")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.monotonic() - self._begun)

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], object]) -> float:
        """A piece of work's seconds, until the device is done with it."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def repeated(self, work: Callable[[], object], count: int = 3) -> dict[str, float]:
        """Median, least and greatest seconds of some runs after a first that does not count; fewer where time is short, but one."""
        spent = self.timed(work)
        seconds = [self.timed(work)]
        while len(seconds) < (1 if self.tiny else count) and self.left > 2 * spent + seconds[-1]:
            seconds.append(self.timed(work))
        return {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "runs": len(seconds)}

    def fast(self, work: Callable[[], object], count: int = 10) -> float:
        """Median seconds of a run of work so short that the time between host and device would count: ``count`` runs at once."""

        def runs() -> None:
            for _ in range(count):
                work()

        return self.repeated(runs, 5)["seconds"] / count
