"""Flower's simulation on Ray: workers on this machine."""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedmllm.engine.flower import require_flower
from fedmllm.errors import FederationError

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

_POLL = 0.02
"""Seconds between two looks for its nodes."""


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
        FederationError: if the simulation does not start, or breaks.
    """
    require_flower("ray")
    from flwr.serverapp import ServerApp

    server, handed, over = ServerApp(), queue.Queue[Any](), threading.Event()

    @server.main()
    def main(grid: Grid, context: object) -> None:
        while len(found := list(grid.get_node_ids())) < nodes:
            time.sleep(_POLL)
        handed.put((grid, found))
        over.wait()

    thread = threading.Thread(target=_simulate, args=(server, app, nodes, cpus, gpus, handed), name="flower", daemon=True)
    thread.start()
    try:
        started = handed.get()
        if isinstance(started, BaseException):
            raise FederationError(f"Flower's simulation did not start: {started}") from started
        yield started
    finally:
        over.set()
        thread.join()


def _simulate(server: Any, app: Any, nodes: int, cpus: float, gpus: float, handed: queue.Queue[Any]) -> None:
    """Until the server's part ends. What goes wrong is handed to the one who waits for the start."""
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    logging.getLogger("ray").setLevel(logging.ERROR)
    # Flower hands the resources to Ray as options of its actors: one that dies is started anew, and a task it died of is tried once more.
    resources: Any = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 1}
    start: Any = {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus)), "log_to_driver": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_simulation(server, app, nodes, backend_config={"client_resources": resources, "init_args": start})
    except BaseException as error:
        handed.put(error)
