"""This process as the server of a run on Flower's SuperLink.

A run of Flower is begun for each training, and its server's part is taken over by this process, which needs the SuperLink's secret. Code is not
sent: what Flower calls the app is empty here, and sites run what they have installed. All that is not Flower's public interface is in this file and in
``fedmllm.sites.supernode``; both are written for flwr 1.41.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedmllm.errors import FederationError, RunError

if TYPE_CHECKING:
    from flwr.app import Message

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


@dataclass(frozen=True)
class SuperLink:
    """Where a SuperLink is, and what opens it.

    Attributes:
        address: ``host:port``.
        certificate: file of the authority that its certificate is checked against.
        secret: file of the secret that lets one be the server of runs.
        keys: sites' public keys by name, in OpenSSH's format.
        patience: seconds for which it is waited for where it cannot be reached.
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
        """
        from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest

        with closing(self._control()) as control:
            known = self.sites_of(self.reached(lambda: control.ListNodes(ListNodesRequest())).nodes_info)
            for name, key in self.keys.items():
                if name not in known:
                    control.RegisterNode(RegisterNodeRequest(public_key=_public_key(name, key), name=name))

    def sites_of(self, nodes: Iterable[Any]) -> dict[str, Any]:
        """Those of Flower's nodes that have a site's key, by the site. Names are no proof: Flower lets anybody admit a node under any."""
        keys = {_public_key(name, key): name for name, key in self.keys.items()}
        found = ((keys.get(node.public_key if isinstance(node.public_key, bytes) else node.public_key.encode()), node) for node in nodes)
        return {name: node for name, node in found if name is not None}

    def reached(self, call: Callable[[], T]) -> T:
        """The result of a call; where there is no connection, tried again for as long as there is patience.

        Raises:
            ConnectionError: if it cannot be reached, or turns the call down.
        """
        import httpx
        from flwr.supercore.run import RunNotRunningException

        until = time.monotonic() + self.patience
        while True:
            try:
                return call()
            except (httpx.HTTPStatusError, RunNotRunningException) as error:
                raise ConnectionError(f"the SuperLink at {self.address} turns this down: {error}") from error
            except httpx.HTTPError as error:
                if time.monotonic() > until:
                    raise ConnectionError(f"the SuperLink at {self.address} cannot be reached: {error}") from error
                time.sleep(5 * _POLL)

    def _control(self) -> Any:
        from flwr.cli.cli_client_interceptor import CliClientHttpInterceptor
        from flwr.supercore.control.control_http_client import ControlHttpClient

        return self._client(ControlHttpClient, "flwr CLI", CliClientHttpInterceptor())

    def _client(self, kind: Any, component: str, *interceptors: Any) -> Any:
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        every = [RuntimeVersionHttpInterceptor(component_name=component), *interceptors]
        return kind.from_server_address(self.address, False, self.certificate.read_bytes(), every)

    def begin(self) -> tuple[int, str]:
        """Begin a run and become its server: its number, and the token that shows it.

        Raises:
            ConnectionError: if the SuperLink cannot be reached, or the secret is not its own.
        """
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.fab_pb2 import Fab

        app = empty_app()
        request = StartRunRequest(fab=Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app))
        with closing(self._control()) as control:
            run = self.reached(lambda: control.StartRun(request)).run_id
        return run, self._take_over(run)

    def _take_over(self, run: int) -> str:
        """The token of a run's server. Those of runs whose server is gone are taken too, and left to end."""
        from flwr.proto.runtime_pb2 import AcquireTaskRequest
        from flwr.supercore.interceptors import SuperExecAuthHttpInterceptor
        from flwr.supercore.runtime import RuntimeHttpClient

        guarded = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        shown = SuperExecAuthHttpInterceptor(master_secret=self.secret.read_bytes(), protected_methods=guarded)
        request, until = AcquireTaskRequest(supported_task_types=["flwr-serverapp"]), time.monotonic() + self.patience
        with closing(self._client(RuntimeHttpClient, "SuperExec", shown)) as client:
            while time.monotonic() < until:
                taken = self.reached(lambda: client.AcquireTask(request))
                if taken.HasField("task") and taken.task.run_id == run:
                    return str(taken.token)
                time.sleep(_POLL)
        raise ConnectionError(f"the SuperLink at {self.address} does not hand over run {run}; is another server taking its runs?")


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


class RunGrid:
    """Flower's Grid of a run that this process serves, begun anew where the SuperLink has lost it.

    What was on its way then is lost, which the round's failure policy deals with.
    """

    def __init__(self, link: SuperLink) -> None:
        self._link = link
        self._grid: Any = None
        self._heartbeat: Any = None
        self._open()

    def _open(self) -> None:
        from flwr.common.serde import run_from_proto
        from flwr.proto.runtime_pb2 import PullTaskInputRequest
        from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
        from flwr.supercore.task_identity import TaskIdentity
        from flwr.superlink.grid import HttpGrid

        _, token = self._link.begin()
        grid = HttpGrid(self._link.address, False, self._link.certificate.read_bytes(), token=token)
        # Flower's own way of trying again ends the process where it is turned down.
        grid._retry_invoker = None  # type: ignore[assignment]
        told = self._link.reached(lambda: grid._runtime_client.PullTaskInput(PullTaskInputRequest()))
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = told.task_id, told.run.run_id, told.context.node_id
        grid.set_run(run_from_proto(told.run))
        self._heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
        self._heartbeat.start()
        self._grid = grid

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        """Send."""
        return self._alive(lambda: self._grid.push_messages(messages))

    def pull_messages(self, message_ids: list[str]) -> Iterable[Message]:
        """Look for answers."""
        return self._alive(lambda: self._grid.pull_messages(message_ids))

    def online(self, names: Sequence[str]) -> dict[str, int]:
        """Sites that are connected, known by their keys; none where the SuperLink is gone, or was."""
        try:
            nodes = self._alive(lambda: self._grid.get_nodes())
        except ConnectionError:
            return {}
        sites = self._link.sites_of(nodes)
        return {name: node.node_id for name, node in sites.items() if name in names and node.status == "online"}

    def _alive(self, call: Callable[[], T]) -> T:
        try:
            return self._link.reached(call)
        except ConnectionError:
            self._end()
            self._open()
            raise

    def _end(self) -> None:
        if self._heartbeat is not None and self._heartbeat.is_running:
            self._heartbeat.stop()
        if self._grid is not None:
            self._grid.close()

    def close(self) -> None:
        """Say that the run has ended."""
        import httpx
        from flwr.proto.runtime_pb2 import PushTaskOutputRequest

        # Where it cannot be told, it finds out by itself when the heartbeat stays away.
        with suppress(httpx.HTTPError):
            self._grid._runtime_client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed"))
        self._end()


@contextmanager
def serving(link: SuperLink) -> Iterator[RunGrid]:
    """A run of Flower for the time of a block.

    Raises:
        FederationError: if the SuperLink cannot be reached.
    """
    try:
        grid = RunGrid(link)
    except ConnectionError as error:
        raise FederationError(f"{error}; start it with fedmllm server up") from error
    try:
        yield grid
    finally:
        grid.close()
