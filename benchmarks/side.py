"""One side of a comparison: a loop in its own processes, which wait between rounds."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil
from safetensors.torch import load_file

from fedmllm.types import Weights

PERIOD = 0.05
"""Seconds between two memory measurements."""


class Side:
    """A loop that trains a round on request.

    Args:
        loop: a module of ``loops``.
        cohort: clients per round.
        batch_size: samples of a micro-batch.
        accumulation: micro-batches of a step.
        off: the switch that is off; for ``ours`` only.
        size, device: the model's; see ``workload``.

    Attributes:
        gpu_mib: peak memory on a GPU so far.
    """

    def __init__(
        self, loop: str, cohort: int, batch_size: int, accumulation: int, off: str = "", size: str = "nano", device: str = "cpu"
    ) -> None:
        self.gpu_mib, self._began = 0.0, False
        self._folder = tempfile.TemporaryDirectory()
        self._end, self._log = Path(self._folder.name, "end.safetensors"), Path(self._folder.name, "log")
        self._name = f"{loop} {cohort} {batch_size} {accumulation}"
        sizes = map(str, (cohort, batch_size, accumulation))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "loops", loop, *sizes, size, device, off, str(self._end)],
                cwd=Path(__file__).parent,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
            )

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        processes = self._tree()
        self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._folder.cleanup()

    def round(self) -> float:
        """Train a round and return its seconds.

        Raises:
            RuntimeError: if the loop has ended, with the end of its log.
        """
        self._began = True
        self._stdin.write("\n")
        self._stdin.flush()
        assert self._process.stdout is not None  # noqa: S101
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._name}: {self._log.read_text(errors='replace')[-2000:]}")
        seconds, self.gpu_mib = map(float, answer.split())
        return seconds

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Suspend the processes inside this block, if they have trained a round."""
        processes = self._tree() if self._began else []
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def peak_memory(self) -> float:
        """Train a round and return the peak memory of all its processes in MiB, with shared memory counted once."""
        peak, over = 0.0, threading.Event()

        def look() -> None:
            nonlocal peak
            while not over.wait(PERIOD):
                peak = max(peak, sum(map(_proportional, self._tree())) / 2**20)

        watcher = threading.Thread(target=look)
        watcher.start()
        self.round()
        over.set()
        watcher.join()
        return peak

    def end(self) -> Weights:
        """Return the mean of the clients' weights after the last round."""
        return load_file(self._end)

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None  # noqa: S101
        return self._process.stdin

    def _tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        return []


def _proportional(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0
