"""A supervisor of processes: it starts each one, logs its output to a file, and restarts it when it ends.

It runs as its own process, ``python -m fedmllm.sites.processes``, and takes only ten megabytes because it imports only the standard library.
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
    """A supervised process.

    Attributes:
        name: the name on the console.
        command: the command and its arguments.
        log: file to which the output is appended.
        delay: seconds between its end and its restart.
        once: whether the process is done once it exits with code 0. Its standard output then goes to the console.
        patience: seconds that it gets to exit on its own before it is killed.
        ends_with: name of another process; when that ends, this one is ended and restarted too. Empty for none.
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
        """Start the process if it is due, and notice if it has ended. Returns whether it has ended."""
        ended = self.process is not None and self.process.poll() is not None
        if ended and self.process is not None:
            self.done = self.once and self.process.returncode == 0
            if self.done:
                self.process = None
                return True
            tell(
                f"{self.name} exited with code {self.process.returncode}{_reason(self.log)}; see {self.log}; restarting in {self.delay:g} s"
            )
            self.process, self.due = None, time.monotonic() + self.delay
        if self.process is None and not self.done and time.monotonic() >= self.due:
            with self.log.open("ab") as log:
                # The process gets its own group, so that a keyboard interrupt reaches only the supervisor, which then ends the process.
                output = None if self.once else log
                self.process = subprocess.Popen(self.command, stdout=output, stderr=log, start_new_session=True)
            if not self.once:
                tell(f"{self.name} started, process {self.process.pid}, log {self.log}")
        return ended

    def stop(self, tell: Callable[[str], None] = lambda line: None) -> bool:
        """Terminate the process, and kill it if it does not exit in time. Returns whether it exited without being killed."""
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
        """Wait for a killed process to end. Only a device that does not respond can prevent that."""
        try:
            if self.process is not None:
                self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            tell(f"{self.name} is still running {self.patience:g} s after it was killed; leaving it")

    def renew(self, tell: Callable[[str], None]) -> None:
        """End the process and restart it: at once, or after the delay if it had to be killed."""
        if self.process is not None:
            delay = 0.0 if self.stop(tell) else self.delay
            tell(f"{self.name} was stopped because {self.ends_with} exited; restarting in {delay:g} s")
            self.process, self.due = None, time.monotonic() + delay


def _reason(log: Path) -> str:
    """Return the reason why a process ended, in one line from its log: Flower's explanation or the last line; empty if the log is empty."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace")[-4000:].splitlines()]
    found = [i for i, line in enumerate(lines) if "Exit Code:" in line]
    reason = " ".join(lines[found[-1] + 1 : found[-1] + 4] if found else [line for line in lines if line][-1:])
    return f" ({' '.join(reason.split())})" if reason else ""


def tend(processes: Sequence[Kept], tell: Callable[[str], None]) -> None:
    """Check all processes once: start, restart and stop them as needed."""
    ended = {process.name for process in processes if process.tend(tell)}
    for process in processes:
        if process.ends_with in ended:
            process.renew(tell)


def keep_up(processes: Sequence[Kept], tell: Callable[[str], None]) -> None:
    """Supervise processes until this one is interrupted or terminated; then end all of them.

    Args:
        processes: the processes, in the order of their start.
        tell: prints a line for each event.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        while True:
            tend(processes, tell)
            time.sleep(0.5)
    except KeyboardInterrupt:
        tell("stopping")
    finally:
        # Ignore further signals until every child has exited, so that an impatient user leaves no processes behind.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for process in reversed(processes):
            process.stop(tell)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the supervisor. Its argument lists the processes as JSON."""
    keep_up([Kept(**{**values, "log": Path(values["log"])}) for values in json.loads(sys.argv[1])], _tell)


def _tell(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
