"""The processes that run at the server and at a site."""

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
"""Seconds before a SuperNode restarts. Flower refuses a site's key for a minute after it last saw the site."""


def become(processes: Sequence[Kept]) -> NoReturn:
    """Replace this process by the supervisor of other processes."""
    specs = [{k: v for k, v in asdict(kept).items() if k not in ("process", "due", "done")} | {"log": str(kept.log)} for kept in processes]
    os.execv(sys.executable, [sys.executable, "-m", "fedmllm.sites.processes", json.dumps(specs)])


def at_server(server: ServerConfig, file: Path) -> list[Kept]:
    """Return the processes of a server: Flower's SuperLink, and a process that admits the sites once the SuperLink answers."""
    admit = [sys.executable, "-m", "fedmllm.sites.admit", str(file)]
    return [superlink(server), Kept("admitting", admit, server.folder / "superlink.log", 5, once=True)]


def at_site(site: SiteConfig, file: Path) -> list[Kept]:
    """Return the processes of a site: Flower's SuperNode, and the worker that trains."""
    worker = [sys.executable, "-m", "fedmllm.sites.client", str(file)]
    return [supernode(site), Kept("worker", worker, site.folder / "worker.log", 2)]


def superlink(server: ServerConfig) -> Kept:
    """Return Flower's SuperLink, with TLS, authentication of sites by their keys, and a database. It runs no code that others send."""
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
    """Return Flower's SuperNode, which connects this site to the server.

    It restarts with the worker. If the worker dies while it hands over a reply, the SuperNode would wait for that reply forever.
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
    """Return the path of a Flower command in the Python environment of this process."""
    return str(Path(sysconfig.get_path("scripts")) / name)
