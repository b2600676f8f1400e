"""Processes that are kept up: each is started, logged into a file, and started anew when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedmllm.engine.flower import QUIET
from fedmllm.engine.sites import ServerConfig, SiteConfig

STOP = 10.0
"""Seconds that a process is given to end by itself."""


@dataclass
class Kept:
    """A process that is to run.

    Attributes:
        name: as told on the console.
        command: its words.
        log: file that its output is appended to.
        delay: seconds after its end before it is started anew. Flower refuses a site's key for a minute after it was last seen.
    """

    name: str
    command: Sequence[str]
    log: Path
    delay: float
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    due: float = field(default=0.0, init=False)

    def tend(self, tell: Callable[[str], None]) -> None:
        """Start it if it is to be started; note its end."""
        if self.process is not None and self.process.poll() is not None:
            tell(
                f"{self.name} ended with code {self.process.returncode}{_reason(self.log)}; see {self.log}; started anew in {self.delay:g} s"
            )
            self.process, self.due = None, time.monotonic() + self.delay
        if self.process is None and time.monotonic() >= self.due:
            with self.log.open("ab") as log:
                # A group of its own: an interruption from the keyboard is for this process, which ends it.
                self.process = subprocess.Popen(
                    self.command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **QUIET}, start_new_session=True
                )
            tell(f"{self.name} started, process {self.process.pid}, log {self.log}")

    def stop(self) -> None:
        """End it, in the end by force."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _reason(log: Path) -> str:
    """What Flower's process said last about why it ends, in a line; empty if it said nothing."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace")[-4000:].splitlines()]
    said = [i for i, line in enumerate(lines) if "Exit Code:" in line]
    return f" ({' '.join(' '.join(lines[said[-1] + 1 : said[-1] + 4]).split())})" if said else ""


def keep_up(processes: Sequence[Kept], tell: Callable[[str], None], ready: Callable[[], None] = lambda: None) -> None:
    """Until this process is interrupted or terminated; then all of them end.

    Args:
        processes: in the order of their start.
        tell: what happens.
        ready: called once, after the first start.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        for process in processes:
            process.tend(tell)
        ready()
        while True:
            time.sleep(0.5)
            for process in processes:
                process.tend(tell)
    except KeyboardInterrupt:
        tell("stopping")
    finally:
        for process in reversed(processes):
            process.stop()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def superlink(server: ServerConfig) -> Kept:
    """Flower's SuperLink: TLS, sites by their keys, a database, and no code of others run."""
    folder = server.folder
    command = [
        _script("flower-superlink"),
        *("--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.crt")),
        *("--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(folder / "secret")),
        *("--host", server.listen, "--port", str(server.port), "--database", str(folder / "state.db")),
    ]
    return Kept("SuperLink", command, folder / "superlink.log", 2)


def supernode(site: SiteConfig) -> Kept:
    """Flower's SuperNode, which connects this site to the server."""
    folder = site.folder
    command = [
        _script("flower-supernode"),
        *("--superlink", site.server, "--root-certificates", str(folder / "ca.crt")),
        *("--auth-supernode-private-key", str(folder / "site.key"), "--isolation", "process"),
        *("--superexec-auth-secret-file", str(folder / "secret"), "--host", "127.0.0.1", "--port", str(site.port)),
    ]
    return Kept("SuperNode", command, folder / "supernode.log", 65)


def worker(site: SiteConfig, file: Path) -> Kept:
    """The process that trains."""
    return Kept("worker", [sys.executable, "-m", "fedmllm.sites.client", str(file)], site.folder / "worker.log", 2)


def _script(name: str) -> str:
    """Flower's command, of the installation that this process runs in."""
    return str(Path(sysconfig.get_path("scripts")) / name)
