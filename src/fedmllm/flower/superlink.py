"""Flower's SuperLink: admits sites and starts runs.

Each training starts a Flower run, and this process takes over the run's server, for which it needs the SuperLink's secret. No code travels: the Flower
app of the run is empty, and sites run the code that they have installed. All uses of Flower's private interfaces are in this file, in ``wire``,
``run_grid``, ``replies`` and ``heartbeat`` in this folder, and in ``fedmllm.sites.supernode`` and ``incoming``. They are written for flwr 1.41.
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
"""Seconds between two attempts."""
_HANDOVER = 60.0
"""Seconds within which a SuperLink must hand over a started run. If the connection breaks during the handover, the run is available again after 30."""
_PATIENCE = 10.0
"""Seconds after its first attempt during which a call is retried immediately. After that, the caller decides whether to call again."""


class TurnedDownError(ConnectionError):
    """The SuperLink refused a call, because it no longer knows the run or does not know the caller."""


@dataclass(frozen=True)
class SuperLink:
    """The address of a SuperLink and the credentials for it.

    Attributes:
        address: ``host:port``.
        certificate: file with the certificate of the authority that signed the SuperLink's certificate.
        secret: file with the secret that lets a process become the server of runs.
        keys: sites' public keys by name, in OpenSSH format.
        patience: default number of seconds to retry calls while the SuperLink cannot be reached.
    """

    address: str
    certificate: Path
    secret: Path
    keys: Mapping[str, bytes]
    patience: float = 60.0

    def register(self) -> None:
        """Admit the sites by their public keys. Sites that are admitted already stay admitted.

        Raises:
            RunError: if a key is invalid.
            ConnectionError: if the SuperLink cannot be reached, or refuses a key because another site has it.
        """
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest

        with closing(self._control()) as control:
            known = self.sites_of(self.reached(lambda: control.ListNodes(ListNodesRequest())).nodes_info)
            for name, key in self.keys.items():
                if name not in known:
                    request = RegisterNodeRequest(public_key=_public_key(name, key), name=name)
                    self.reached(partial(control.RegisterNode, request))

    def sites_of(self, nodes: Iterable[Any]) -> dict[str, Any]:
        """Return the Flower nodes that have a site's key, by site. Node names prove nothing, because Flower lets anybody choose any name."""
        keys = {_public_key(name, key): name for name, key in self.keys.items()}
        found = ((keys.get(node.public_key if isinstance(node.public_key, bytes) else node.public_key.encode()), node) for node in nodes)
        return {name: node for name, node in found if name is not None}

    def reached(self, call: Callable[[], T], patience: float | None = None) -> T:
        """Return the result of a call, retried while there is no connection and patience is left.

        Args:
            call: makes the call.
            patience: seconds to retry; by default those of the link.

        Raises:
            TurnedDownError: if the SuperLink refuses the call.
            ConnectionError: if the SuperLink cannot be reached.
        """
        import httpx
        from flwr.supercore.run import RunNotRunningException

        until = time.monotonic() + (self.patience if patience is None else patience)
        while True:
            try:
                return call()
            except (httpx.HTTPError, RunNotRunningException) as error:
                # Status codes from 500 mean that the SuperLink, or a proxy before it, has a problem, which may be temporary.
                if isinstance(error, RunNotRunningException) or (
                    isinstance(error, httpx.HTTPStatusError) and error.response.is_client_error
                ):
                    raise TurnedDownError(f"the SuperLink at {self.address} refused the call: {_first_line(error)}") from error
                if time.monotonic() >= until:
                    raise ConnectionError(f"the SuperLink at {self.address} cannot be reached: {_first_line(error)}") from error
                time.sleep(5 * _POLL)

    def _control(self) -> Wire:
        from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
        from flwr.supercore.control.control_http_client import ControlHttpClient

        return self._client(ControlHttpClient, "flwr CLI", CliClientHttpInterceptor())

    def server(self, token: str) -> Wire:
        """Return the connection of a run's server."""
        from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        return self._client(RuntimeHttpClient, "flwr-serverapp", RuntimeTokenHttpInterceptor(token))

    def _client(self, kind: Any, component: str, *interceptors: Any) -> Wire:
        return connected(kind, self.address, self.certificate.read_bytes(), component, interceptors, _PATIENCE)

    def begin(self, patience: float | None = None) -> tuple[int, str]:
        """Start a run and become its server.

        Returns:
            The run's number, and the token of its server.

        Raises:
            ConnectionError: if the SuperLink cannot be reached, or the secret is wrong.
        """
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.fab_pb2 import Fab

        app = empty_app()
        request = StartRunRequest(fab=Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app))
        with closing(self._control()) as control:
            run = self.reached(lambda: control.StartRun(request), patience).run_id
        return run, self._take_over(run, patience)

    def _take_over(self, run: int, patience: float | None) -> str:
        """Return the token of a run's server. This also takes runs whose server is gone, and lets them end."""
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
    """Return the app bundle that Flower requires for a run, without any code."""
    from flwr.cli.build import build_fab_from_files

    with warnings.catch_warnings():
        # A library that Flower uses raises this warning.
        warnings.simplefilter("ignore", DeprecationWarning)
        return build_fab_from_files({"pyproject.toml": _PROJECT.encode(), "installed.py": b""})[0]


def _public_key(name: str, content: bytes) -> bytes:
    """Return a public key in Flower's format."""
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    try:
        return public_key_to_bytes(load_ssh_public_key(content))  # type: ignore[arg-type]
    except ValueError as error:
        raise RunError(f"{name}: not an OpenSSH public key ({error}); create one with fedmllm site init") from error
