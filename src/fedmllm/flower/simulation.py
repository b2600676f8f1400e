"""Flower's simulation on Ray: workers on this machine."""

from __future__ import annotations

import logging
import math
import os
import queue
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmllm.errors import FederationError
from fedmllm.flower.installed import require_flower

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

_LOG = logging.getLogger("fedmllm.simulation")
_POLL = 0.02
"""Seconds between two looks for its nodes, and for Ray."""
_START = 300.0
"""Seconds within which Ray must be there."""
_END = 30.0
"""Seconds in which its workers may finish what they do; then they are ended."""
_SOCKET = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Characters that Ray adds to its folder for the longest name of a socket."""
_LONGEST = 103 if sys.platform == "darwin" else 107
"""Bytes of a socket's name, at most."""


@contextmanager
def simulation(app: ClientApp, nodes: int, cpus: float, gpus: float) -> Iterator[tuple[Grid, list[int]]]:
    """Flower's simulation on Ray for the time of a block: its Grid, and its nodes.

    Args:
        app: what every node runs, in worker processes that stay.
        nodes: as many as a round has clients.
        cpus: of one worker; Ray starts as many workers as this machine has room for. One that dies is started anew.
        gpus: of one worker.

    Raises:
        ConfigError: if Flower or Ray is not installed.
        FederationError: if the simulation does not start, or, where the Grid is used, if it has ended.
    """
    require_flower("ray")
    with _short_folder() as folder:
        running = _Simulation(app, nodes, _backend(cpus, gpus, folder))
        try:
            yield running.started()
        finally:
            running.end()


@contextmanager
def _short_folder() -> Iterator[Path | None]:
    """Where Ray is to keep its sockets; None for its own choice, unless their names would be too long there.

    Raises:
        FederationError: if there is no short folder.
    """
    chosen = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None) or "/tmp"
    if sys.platform == "win32" or len(os.fsencode(f"{chosen}/ray")) + _SOCKET <= _LONGEST:
        yield None
        return
    room = _LONGEST - _SOCKET - len("/ray")
    why = f"the name of a temporary folder for Ray may have {room} bytes, {chosen} has {len(os.fsencode(chosen))}"
    try:
        folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    except OSError as error:
        raise FederationError(f"{why}, and /tmp cannot be used ({error}); set RAY_TMPDIR to a short one") from error
    with folder as name:
        _LOG.warning("%s; %s is used", why, name)
        yield Path(name)


def _backend(cpus: float, gpus: float, folder: Path | None) -> dict[str, Any]:
    """Flower's settings of Ray."""
    # Flower hands the resources to Ray as options of its actors: one that dies is started anew, and a task it died of is tried once more.
    resources = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 1}
    start: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus)), "log_to_driver": False}
    return {"client_resources": resources, "init_args": start | ({} if folder is None else {"_temp_dir": str(folder)})}


class _Simulation:
    """Runs in a thread of its own until it is ended."""

    def __init__(self, app: Any, nodes: int, backend: dict[str, Any]) -> None:
        self._nodes, self._backend = nodes, backend
        self._handed, self._over = queue.Queue[Any](), threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._simulate, args=(app,), name="flower", daemon=True)
        self._thread.start()

    def started(self) -> Any:
        """The Grid, and the nodes, once Ray is there.

        Raises:
            FederationError: if it does not start.
        """
        import ray

        until, handed = time.monotonic() + _START, None
        while handed is None or not ray.is_initialized():
            self._alive("did not start")
            if time.monotonic() > until:
                raise FederationError(f"Flower's simulation did not start within {_START:g} s; Ray does not answer")
            try:
                handed = handed or self._handed.get(timeout=_POLL)
            except queue.Empty:
                continue
            time.sleep(_POLL)
        grid, found = handed
        return _Watched(grid, lambda: self._alive("ended")), found

    def _alive(self, words: str) -> None:
        if not self._thread.is_alive():
            raise FederationError(f"Flower's simulation {words}: {_root(self._failed)}") from self._failed

    def end(self) -> None:
        """End it; what its workers are at is waited for, though not for ever."""
        self._over.set()
        self._thread.join(_END)
        if self._thread.is_alive():
            _LOG.warning("clients still train after %g s; their workers are ended", _END)
            _end_workers()
            self._thread.join(_END)

    def _simulate(self, app: Any) -> None:
        """Until the server's part ends. What goes wrong is kept for whoever uses the Grid, or waits for it."""
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation

        server = ServerApp()
        server.main()(self._main)
        logging.getLogger("flwr").setLevel(logging.CRITICAL)
        logging.getLogger("ray").setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run_simulation(server, app, self._nodes, backend_config=self._backend)
        except BaseException as error:
            self._failed = error

    def _main(self, grid: Grid, context: object) -> None:
        """The server's part."""
        while len(found := list(grid.get_node_ids())) < self._nodes and not self._over.is_set():
            time.sleep(_POLL)
        self._handed.put((grid, found))
        self._over.wait()


def _end_workers() -> None:
    """End Ray's workers that this process has begun, by force. Flower has their handles, and keeps them to itself."""
    from ray import ActorID
    from ray._private import state, worker

    core: Any = worker.global_worker
    for name, told in state.actors(job_id=core.current_job_id).items():
        if told["State"] != "DEAD":
            core.core_worker.kill_actor(ActorID(bytes.fromhex(name)), True)


def _root(error: BaseException | None) -> str:
    """What an error came from, in a line."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return "it was stopped" if error is None else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _Watched:
    """A Grid for as long as what answers behind it is there."""

    def __init__(self, grid: Grid, alive: Callable[[], None]) -> None:
        self._grid, self._alive = grid, alive

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        """Send."""
        self._alive()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: list[str]) -> Iterable[Message]:
        """The replies that are there."""
        self._alive()
        return self._grid.pull_messages(message_ids)
