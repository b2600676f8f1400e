"""Processes that are kept up: each is started, logged into a file, and started anew when it ends.

This is a process of its own, ``python -m fedmllm.sites.processes``, of ten megabytes: nothing is imported here but what Python comes with.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Kept:
    """A process that is to run.

    Attributes:
        name: as told on the console.
        command: its words.
        log: file that its output is appended to.
        delay: seconds after its end before it is started anew.
        once: whether it has done its work when it ends well. What it says goes to the console.
        patience: seconds that it is given to end by itself.
        ends_with: name of the process whose end ends this one too, which is then started anew; empty for none.
    """

    name: str
    command: Sequence[str]
    log: Path
    delay: float
    once: bool = False
    patience: float = 10.0
    ends_with: str = ""
    done: bool = field(default=False, init=False)
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    due: float = field(default=0.0, init=False)

    def tend(self, tell: Callable[[str], None]) -> bool:
        """Start it if it is to be started; note its end. Whether it has ended."""
        ended = self.process is not None and self.process.poll() is not None
        if ended and self.process is not None:
            self.done = self.once and self.process.returncode == 0
            if self.done:
                self.process = None
                return True
            tell(
                f"{self.name} ended with code {self.process.returncode}{_reason(self.log)}; see {self.log}; started anew in {self.delay:g} s"
            )
            self.process, self.due = None, time.monotonic() + self.delay
        if self.process is None and not self.done and time.monotonic() >= self.due:
            with self.log.open("ab") as log:
                # A group of its own: an interruption from the keyboard is for this process, which ends it.
                output = None if self.once else log
                self.process = subprocess.Popen(self.command, stdout=output, stderr=log, start_new_session=True)
            if not self.once:
                tell(f"{self.name} started, process {self.process.pid}, log {self.log}")
        return ended

    def stop(self, tell: Callable[[str], None] = lambda words: None) -> bool:
        """End it, in the end by force. Whether that was not needed."""
        if self.process is None:
            return True
        self.process.terminate()
        try:
            self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self._killed(tell)
            return False
        return True

    def _killed(self, tell: Callable[[str], None]) -> None:
        """Wait for its end, which only a device that does not answer keeps it from."""
        try:
            if self.process is not None:
                self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            tell(f"{self.name} has not ended {self.patience:g} s after it was killed; it is left")

    def renew(self, tell: Callable[[str], None]) -> None:
        """End it; it is started anew at once, or after the delay if it had to be ended by force."""
        if self.process is not None:
            delay = 0.0 if self.stop(tell) else self.delay
            tell(f"{self.name} is ended with {self.ends_with}; started anew in {delay:g} s")
            self.process, self.due = None, time.monotonic() + delay


def _reason(log: Path) -> str:
    """What a process said last about why it ends, in a line: Flower's words for it, or the last line; empty if it said nothing."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace")[-4000:].splitlines()]
    said = [i for i, line in enumerate(lines) if "Exit Code:" in line]
    words = " ".join(lines[said[-1] + 1 : said[-1] + 4] if said else [line for line in lines if line][-1:])
    return f" ({' '.join(words.split())})" if words else ""


def tend(processes: Sequence[Kept], tell: Callable[[str], None]) -> None:
    """Look after all of them once."""
    ended = {process.name for process in processes if process.tend(tell)}
    for process in processes:
        if process.ends_with in ended:
            process.renew(tell)


def keep_up(processes: Sequence[Kept], tell: Callable[[str], None]) -> None:
    """Until this process is interrupted or terminated; then all of them end.

    Args:
        processes: in the order of their start.
        tell: what happens.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        while True:
            tend(processes, tell)
            time.sleep(0.5)
    except KeyboardInterrupt:
        tell("stopping")
    finally:
        # Whoever is impatient does not leave processes behind: each of them is ended, in the end by force.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for process in reversed(processes):
            process.stop(tell)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The process: what to keep up, as JSON, is its argument."""
    keep_up([Kept(**{**values, "log": Path(values["log"])}) for values in json.loads(sys.argv[1])], _tell)


def _tell(words: str) -> None:
    print(words, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
