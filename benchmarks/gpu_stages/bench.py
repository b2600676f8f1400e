"""The context of a stage: the device, the size of models, the time left, and the file for rows."""

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
    """The context of one stage.

    Attributes:
        stage: its name, which every row contains.
        rows: the file that rows are appended to.
        device: the models' device.
        tiny: use models of a few thousand parameters, short samples and single repeats, to test the script.
        seconds: the stage's time limit.
    """

    stage: str
    rows: Path
    device: torch.device
    tiny: bool = False
    seconds: float = 60.0
    _begun: float = field(default_factory=time.monotonic)

    def row(self, name: str, **values: Any) -> None:
        """Append a row immediately, because the stage may be killed at any time."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, "name": name, **values}) + "\n")

    @property
    def left(self) -> float:
        """Seconds that the stage has left."""
        return self.seconds - (time.monotonic() - self._begun)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has finished."""
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, work: Callable[[], object]) -> float:
        """Return the seconds of some work, until the device has finished it."""
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def repeated(self, work: Callable[[], object], count: int = 3) -> dict[str, float]:
        """Return the median, least and greatest seconds of some runs after a warm-up; fewer runs if time is short, but at least one."""
        spent = self.timed(work)
        seconds = [self.timed(work)]
        while len(seconds) < (1 if self.tiny else count) and self.left > 2 * spent + seconds[-1]:
            seconds.append(self.timed(work))
        return {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds), "runs": len(seconds)}

    def fast(self, work: Callable[[], object], count: int = 10) -> float:
        """Return the median seconds of very short work. It times ``count`` runs at once, so that the delay between host and device does not count."""

        def runs() -> None:
            for _ in range(count):
                work()

        return self.repeated(runs, 5)["seconds"] / count
