"""What is kept up at the server and at a site."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from fedmllm.flower.settings import ServerConfig, SiteConfig
from fedmllm.sites.processes import Kept

_KEY_IS_SEEN = 65
"""Seconds: Flower refuses a site's key for a minute after it was last seen."""


def become(processes: Sequence[Kept]) -> NoReturn:
    """Turn this process into the one that keeps them up."""
    told = [{k: v for k, v in asdict(kept).items() if k not in ("process", "due", "done")} | {"log": str(kept.log)} for kept in processes]
    os.execv(sys.executable, [sys.executable, "-m", "fedmllm.sites.processes", json.dumps(told)])


def at_server(server: ServerConfig, file: Path) -> list[Kept]:
    """Flower's SuperLink, and what admits the sites once it is there."""
    admit = [sys.executable, "-m", "fedmllm.sites.admit", str(file)]
    return [superlink(server), Kept("admitting", admit, server.folder / "superlink.log", 5, once=True)]


def at_site(site: SiteConfig, file: Path) -> list[Kept]:
    """Flower's SuperNode, and the process that trains."""
    worker = [sys.executable, "-m", "fedmllm.sites.client", str(file)]
    return [supernode(site), Kept("worker", worker, site.folder / "worker.log", 2)]


def superlink(server: ServerConfig) -> Kept:
    """Flower's SuperLink: TLS, sites by their keys, a database, and no code of others run."""
    folder, (host, port) = server.folder, server.listening
    command = [
        _script("flower-superlink"),
        *("--ssl-ca-certfile", str(folder / "ca.crt"), "--ssl-certfile", str(folder / "server.crt")),
        *("--ssl-keyfile", str(folder / "server.key"), "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(folder / "secret")),
        *("--host", host, "--port", str(port), "--database", str(folder / "state.db")),
    ]
    return Kept("SuperLink", command, folder / "superlink.log", 2)


def supernode(site: SiteConfig) -> Kept:
    """Flower's SuperNode, which connects this site to the server.

    It waits for ever for a reply that its worker had begun to hand over when it ended; so it ends with the worker.
    """
    folder = site.folder
    command = [
        _script("flower-supernode"),
        *("--superlink", site.server, "--root-certificates", str(folder / "ca.crt")),
        *("--auth-supernode-private-key", str(folder / "site.key"), "--isolation", "process"),
        *("--superexec-auth-secret-file", str(folder / "secret"), "--host", "127.0.0.1", "--port", str(site.port)),
    ]
    return Kept("SuperNode", command, folder / "supernode.log", _KEY_IS_SEEN, ends_with="worker")


def _script(name: str) -> str:
    """Flower's command, of the installation that this process runs in."""
    return str(Path(sysconfig.get_path("scripts")) / name)
