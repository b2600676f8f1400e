"""Flower's SuperLink: admitting sites, and beginning runs.

A run of Flower is begun for each training, and its server's part is taken over by this process, which needs the SuperLink's secret. Code is not
sent: what Flower calls the app is empty here, and sites run what they have installed. All that is not Flower's public interface is in this file, in
``wire``, ``run_grid``, ``replies`` and ``heartbeat`` beside it and in ``fedmllm.sites.supernode`` and ``incoming``; they are written for flwr 1.41.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from fedmllm.errors import RunError
from fedmllm.flower.wire import Wire, connected

T = TypeVar("T")
_PROJECT = """[project]
name = "fedmllm-run"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "fedmllm"
[tool.flwr.app.components]
serverapp = "installed:app"
clientapp = "installed:app"
"""
_POLL = 0.1
"""Seconds between two tries."""
_HANDOVER = 60.0
"""Seconds within which a SuperLink hands over a run that has been begun; one that was handed over to a connection that broke is there again after 30."""
_PATIENCE = 10.0
"""Seconds after its first try at which a call is not repeated any more at once; whoever asks does so again, as long as there is patience or time."""


class TurnedDownError(ConnectionError):
    """The SuperLink is there and says no: it does not know the run any more, or who asks."""


@dataclass(frozen=True)
class SuperLink:
    """Where a SuperLink is, and what opens it.

    Attributes:
        address: ``host:port``.
        certificate: file of the authority that its certificate is checked against.
        secret: file of the secret that lets one be the server of runs.
        keys: sites' public keys by name, in OpenSSH's format.
        patience: seconds for which it is waited for where it cannot be reached, unless another time is given.
    """

    address: str
    certificate: Path
    secret: Path
    keys: Mapping[str, bytes]
    patience: float = 60.0

    def register(self) -> None:
        """Admit the sites by their keys; those that are admitted already stay so.

        Raises:
            RunError: if a key is none, or another site has it.
            ConnectionError: if the SuperLink cannot be reached.
        """
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest

        with closing(self._control()) as control:
            known = self.sites_of(self.reached(lambda: control.ListNodes(ListNodesRequest())).nodes_info)
            for name, key in self.keys.items():
                if name not in known:
                    request = RegisterNodeRequest(public_key=_public_key(name, key), name=name)
                    self.reached(partial(control.RegisterNode, request))

    def sites_of(self, nodes: Iterable[Any]) -> dict[str, Any]:
        """Those of Flower's nodes that have a site's key, by the site. Names are no proof: Flower lets anybody admit a node under any."""
        keys = {_public_key(name, key): name for name, key in self.keys.items()}
        found = ((keys.get(node.public_key if isinstance(node.public_key, bytes) else node.public_key.encode()), node) for node in nodes)
        return {name: node for name, node in found if name is not None}

    def reached(self, call: Callable[[], T], patience: float | None = None) -> T:
        """The result of a call; where there is no connection, tried again for as long as there is patience.

        Raises:
            TurnedDownError: if it turns the call down.
            ConnectionError: if it cannot be reached.
        """
        import httpx
        from flwr.supercore.run import RunNotRunningException

        until = time.monotonic() + (self.patience if patience is None else patience)
        while True:
            try:
                return call()
            except (httpx.HTTPError, RunNotRunningException) as error:
                # Codes from 500 on are of a SuperLink, or what is before it, that is not well; it may be in a moment.
                if isinstance(error, RunNotRunningException) or (
                    isinstance(error, httpx.HTTPStatusError) and error.response.is_client_error
                ):
                    raise TurnedDownError(f"the SuperLink at {self.address} turns this down: {_first_line(error)}") from error
                if time.monotonic() >= until:
                    raise ConnectionError(f"the SuperLink at {self.address} cannot be reached: {_first_line(error)}") from error
                time.sleep(5 * _POLL)

    def _control(self) -> Wire:
        from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
        from flwr.supercore.control.control_http_client import ControlHttpClient

        return self._client(ControlHttpClient, "flwr CLI", CliClientHttpInterceptor())

    def server(self, token: str) -> Wire:
        """The connection of a run's server."""
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        return self._client(RuntimeHttpClient, "flwr-serverapp", RuntimeTokenHttpInterceptor(token))

    def _client(self, kind: Any, component: str, *interceptors: Any) -> Wire:
        return connected(kind, self.address, self.certificate.read_bytes(), component, interceptors, _PATIENCE)

    def begin(self, patience: float | None = None) -> tuple[int, str]:
        """Begin a run and become its server: its number, and the token that shows it.

        Raises:
            ConnectionError: if the SuperLink cannot be reached, or the secret is not its own.
        """
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.fab_pb2 import Fab

        app = empty_app()
        request = StartRunRequest(fab=Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app))
        with closing(self._control()) as control:
            run = self.reached(lambda: control.StartRun(request), patience).run_id
        return run, self._take_over(run, patience)

    def _take_over(self, run: int, patience: float | None) -> str:
        """The token of a run's server. Those of runs whose server is gone are taken too, and left to end."""
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        guarded = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        shown = SuperExecAuthHttpInterceptor(master_secret=self.secret.read_bytes(), protected_methods=guarded)
        request, until = AcquireTaskRequest(supported_task_types=["flwr-serverapp"]), time.monotonic() + _HANDOVER
        with closing(self._client(RuntimeHttpClient, "SuperExec", shown)) as client:
            while time.monotonic() < until:
                taken = self.reached(lambda: client.AcquireTask(request), patience)
                if taken.HasField("task") and taken.task.run_id == run:
                    return str(taken.token)
                time.sleep(_POLL)
        raise ConnectionError(f"the SuperLink at {self.address} does not hand over run {run}; is another server taking its runs?")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


@cache
def empty_app() -> bytes:
    """What Flower wants of a run, with no code in it."""
    from flwr.cli.build import build_fab_from_files

    with warnings.catch_warnings():
        # Of a library that Flower uses.
        warnings.simplefilter("ignore", DeprecationWarning)
        return build_fab_from_files({"pyproject.toml": _PROJECT.encode(), "installed.py": b""})[0]


def _public_key(name: str, content: bytes) -> bytes:
    """As Flower writes it."""
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    try:
        return public_key_to_bytes(load_ssh_public_key(content))  # type: ignore[arg-type]
    except ValueError as error:
        raise RunError(f"{name}: no public key of OpenSSH ({error}); fedmllm site init makes them") from error
