"""The same loop over Flower: its Grid carries messages to workers that hold the model and the data."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmllm.engine.in_process import Assignment
from fedmllm.engine.messages import expected, read_answer, write_task
from fedmllm.errors import ConfigError, FederationError
from fedmllm.types import Answer, ClientFailure, Sample

if TYPE_CHECKING:
    from flwr.app import Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Neither Flower nor Ray calls home or installs anything."""
_POLL = 0.02
"""Seconds between two looks for an answer."""
_GRACE = 30.0
"""Seconds that a message outlives its round's deadline: then the answer of one that is late is dropped on the way."""
_NEVER = 30 * 24 * 3600.0
"""Seconds that a message lives without a deadline."""


def require_flower(*modules: str) -> None:
    """Refuse the engine where Flower, or one of these modules, is not installed.

    Raises:
        ConfigError: naming what to install.
    """
    if missing := [name for name in ("flwr", *modules) if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"engine.name: flower needs {' and '.join(missing)}; pip install 'fedmllm[flower]', or use in_process")
    os.environ |= QUIET


def enclose(content: bytes) -> RecordDict:
    """Bytes as a record of Flower, which sends arrays in pieces and without a limit of size."""
    from flwr.app import Array, ArrayRecord, RecordDict

    array = Array(dtype="uint8", shape=(len(content),), stype="fedmllm.safetensors", data=content)
    return RecordDict({"content": ArrayRecord({"bytes": array})})


def enclosed(record: RecordDict) -> bytes:
    """The opposite.

    Raises:
        ValueError: if it is something else.
    """
    try:
        return bytes(record.array_records["content"]["bytes"].data)
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError("the message holds no record of ours") from error


@dataclass(frozen=True)
class FlowerEngine:
    """Sends a round's tasks to nodes, and takes the answers in the clients' order, one at a time.

    Attributes:
        grid: Flower's.
        stage: what the rounds belong to.
        about: what workers are told beside.
        nodes: where the clients of a round are reached, by their place in it.
    """

    grid: Grid
    stage: str
    about: Mapping[str, Any]
    nodes: Sequence[int]

    def map_clients(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[Answer]:
        """Answers in the clients' order. Those that come earlier wait outside of this process where Flower has a server of its own."""
        begun = time.monotonic()
        sent = {name: self._send(assignment, name, node) for name, node in zip(clients, self.nodes, strict=False)}
        for name, message_id in sent.items():
            yield self._receive(assignment, name, message_id, begun)

    def _send(self, assignment: Assignment, client: str, node: int) -> str:
        """One at a time, so that no more than one is held here."""
        from flwr.app import Message

        life = _NEVER if assignment.deadline is None else assignment.deadline + _GRACE
        content = enclose(write_task(assignment, self.stage, client, self.about))
        (message_id,) = self.grid.push_messages([Message(content, dst_node_id=node, message_type="train", ttl=life)])
        return message_id

    def _receive(self, assignment: Assignment, client: str, message_id: str, begun: float) -> Answer:
        """Look until the answer is there, or it is too late."""
        while True:
            # Asked before the clock: what is there when time is up still counts, however long the ones before it took.
            late = assignment.deadline is not None and time.monotonic() - begun > assignment.deadline
            for reply in self.grid.pull_messages([message_id]):
                return _read(reply, client, assignment)
            if late:
                return ClientFailure(client, f"no answer within the deadline of {assignment.deadline:g} s")
            time.sleep(_POLL)


def _read(reply: Message, client: str, assignment: Assignment) -> Answer:
    if reply.has_error():
        return ClientFailure(client, f"Flower: {reply.error.reason}")
    try:
        return read_answer(enclosed(reply.content), client, expected(assignment, client))
    except ValueError as error:
        return ClientFailure(client, str(error))


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
