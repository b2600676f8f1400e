"""Flower's simulation on Ray, which runs worker processes on this machine."""

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
"""Seconds between two checks for the nodes and for Ray."""
_START = 300.0
"""Seconds within which Ray must start."""
_END = 30.0
"""Seconds that workers get to finish their tasks before they are killed."""
_SOCKET = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Characters that Ray appends to its folder for its longest socket name."""
_LONGEST = 103 if sys.platform == "darwin" else 107
"""Maximum length of a socket's name in bytes."""


@contextmanager
def simulation(app: ClientApp, nodes: int, cpus: float, gpus: float) -> Iterator[tuple[Grid, list[int]]]:
    """Run Flower's simulation on Ray for the duration of a ``with`` block.

    Args:
        app: the ClientApp that every node runs, in long-lived worker processes.
        nodes: number of nodes; as many as clients that train at the same time.
        cpus: CPU cores per worker. Ray starts as many workers as fit on this machine and restarts workers that die.
        gpus: GPUs per worker.

    Yields:
        (Flower's Grid, ids of the nodes).

    Raises:
        ConfigError: if Flower or Ray is not installed.
        FederationError: if the simulation does not start. Calls of the Grid raise it if the simulation has ended.
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
    """Yield a folder for Ray's sockets, or None to let Ray choose. A folder is needed only if socket names would be too long otherwise.

    Raises:
        FederationError: if no short folder can be created.
    """
    chosen = os.environ.get("RAY_TMPDIR") or (os.environ.get("TMPDIR") if sys.platform.startswith("linux") else None) or "/tmp"
    if sys.platform == "win32" or len(os.fsencode(f"{chosen}/ray")) + _SOCKET <= _LONGEST:
        yield None
        return
    room = _LONGEST - _SOCKET - len("/ray")
    why = f"the name of Ray's temporary folder may have at most {room} bytes, {chosen} has {len(os.fsencode(chosen))}"
    try:
        folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    except OSError as error:
        raise FederationError(f"{why}, and /tmp cannot be used ({error}); set RAY_TMPDIR to a folder with a shorter name") from error
    with folder as name:
        _LOG.warning("%s; using %s instead", why, name)
        yield Path(name)


def _backend(cpus: float, gpus: float, folder: Path | None) -> dict[str, Any]:
    """Return Flower's settings for Ray."""
    # Flower passes the resources to Ray as options of its actors. Ray restarts an actor that dies, and retries the task it died in once.
    resources = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 1}
    start: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus)), "log_to_driver": False}
    return {"client_resources": resources, "init_args": start | ({} if folder is None else {"_temp_dir": str(folder)})}


class _Simulation:
    """A simulation that runs in its own thread until ``end``."""

    def __init__(self, app: Any, nodes: int, backend: dict[str, Any]) -> None:
        self._nodes, self._backend = nodes, backend
        self._handed, self._over = queue.Queue[Any](), threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._simulate, args=(app,), name="flower", daemon=True)
        self._thread.start()

    def started(self) -> Any:
        """Wait for Ray and return the Grid and the node ids.

        Raises:
            FederationError: if the simulation does not start.
        """
        import ray

        until, handed = time.monotonic() + _START, None
        while handed is None or not ray.is_initialized():
            self._alive("did not start")
            if time.monotonic() > until:
                raise FederationError(f"Flower's simulation did not start within {_START:g} s because Ray does not respond")
            try:
                handed = handed or self._handed.get(timeout=_POLL)
            except queue.Empty:
                continue
            time.sleep(_POLL)
        grid, found = handed
        return _Watched(grid, lambda: self._alive("ended")), found

    def _alive(self, event: str) -> None:
        if not self._thread.is_alive():
            raise FederationError(f"Flower's simulation {event}: {_root(self._failed)}") from self._failed

    def end(self) -> None:
        """End the simulation. Workers get limited time to finish their tasks and are then killed."""
        self._over.set()
        self._thread.join(_END)
        if self._thread.is_alive():
            _LOG.warning("Clients are still training after %g s; killing their workers", _END)
            _end_workers()
            self._thread.join(_END)

    def _simulate(self, app: Any) -> None:
        """Run the simulation until ``_main`` returns. An error is stored, for the caller that uses the Grid or waits for it."""
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
        """Run the server side: hand the Grid to the caller once all nodes exist, then wait for the end."""
        while len(found := list(grid.get_node_ids())) < self._nodes and not self._over.is_set():
            time.sleep(_POLL)
        self._handed.put((grid, found))
        self._over.wait()


def _end_workers() -> None:
    """Kill the Ray workers of this process. Flower does not expose their handles, so they are looked up in Ray's state."""
    from ray import ActorID
    from ray._private import state, worker

    core: Any = worker.global_worker
    for name, actor in state.actors(job_id=core.current_job_id).items():
        if actor["State"] != "DEAD":
            core.core_worker.kill_actor(ActorID(bytes.fromhex(name)), True)


def _root(error: BaseException | None) -> str:
    """Return the root cause of an error in one line."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return "it was stopped" if error is None else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class _Watched:
    """A Grid that raises an error once the simulation behind it has ended."""

    def __init__(self, grid: Grid, alive: Callable[[], None]) -> None:
        self._grid, self._alive = grid, alive

    def push_messages(self, messages: list[Message]) -> Iterable[str]:
        """Send messages and return their ids."""
        self._alive()
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: list[str]) -> Iterable[Message]:
        """Return the replies that have arrived."""
        self._alive()
        return self._grid.pull_messages(message_ids)
