"""A federation of real processes on this machine: a server and sites, each started with the user's command."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def free_ports(count: int) -> list[int]:
    """Ports in use by nobody, below the range for outgoing connections, which could take one before its server starts."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 200):
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} ports are free")


class Processes:
    """A context that starts the processes and ends them.

    Args:
        folder: the federation's folder.
        sites: additions to each site's ``site.yaml``, by name.
        later: sites that are not started with the others.
    """

    def __init__(self, folder: Path, sites: Mapping[str, Mapping[str, Any]], later: Sequence[str] = ()) -> None:
        self.folder, self.names, self.later = folder, sorted(sites), later
        first, *others = free_ports(len(sites) + 1)
        self.address = f"127.0.0.1:{first}"
        self.run("site", "init", str(folder), "--address", self.address, *(word for name in sites for word in ("--site", name)))
        for name, port in zip(self.names, others, strict=True):
            path = self.site(name)
            path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "port": port, "device": "cpu", **sites[name]}))
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def server(self) -> Path:
        return self.folder / "server" / "server.yaml"

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name / "site.yaml"

    def __enter__(self) -> Processes:
        self.start("server", "server", "up", str(self.server))
        self.wait_for(self.folder / "server.out", "ready at")
        for name in self.names:
            if name not in self.later:
                self.up(name)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started.values():
            process.terminate()
        for process in self.started.values():
            process.wait(60)

    def up(self, name: str) -> None:
        """Start a site."""
        self.start(name, "site", "up", str(self.site(name)))

    def start(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self.started[name] = subprocess.Popen(
                [sys.executable, "-m", "fedmllm", *words], stdout=output, stderr=subprocess.STDOUT, env=ENVIRONMENT
            )

    def run(self, *words: str, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        command = [sys.executable, "-m", "fedmllm", *words]
        return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=check)

    def train(self, experiment: Mapping[str, Any], output: Path, *overrides: str) -> subprocess.Popen[str]:
        """Start training over the sites."""
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(dict(experiment)))
        words = ["train", str(file), "--output", str(output), "--track", "none", "engine.name=flower", f"engine.server={self.server}"]
        return subprocess.Popen(
            [sys.executable, "-m", "fedmllm", *words, *overrides],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self, log: Path, name: str) -> int:
        """Kill the latest process of that name in the log of a site or the server, and return its id."""
        pid = self.latest(log, name)
        os.kill(pid, signal.SIGKILL)
        return pid

    @staticmethod
    def latest(log: Path, name: str) -> int:
        """The id of the latest process of that name in the log of a site or the server."""
        lines = [line for line in log.read_text().splitlines() if line.startswith(f"{name} started, process ")]
        return int(lines[-1].split("process ")[1].split(",")[0])

    def worker(self, site: str) -> int:
        """The id of a site's worker."""
        return self.latest(self.folder / f"{site}.out", "worker")

    @staticmethod
    def wait_for(path: Path, text: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not (path.exists() and text in path.read_text()):
            if time.monotonic() > until:
                raise TimeoutError(f"{text!r} is not in {path}:\n{path.read_text() if path.exists() else '(not there)'}")
            time.sleep(0.1)


def ended(process: subprocess.Popen[str], seconds: float = 300) -> str:
    """The output of a process that must exit with code 0."""
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def rounds(folder: Path) -> Sequence[str]:
    """The lines of metrics so far."""
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []
