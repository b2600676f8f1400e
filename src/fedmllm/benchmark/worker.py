"""A process that trains clients for a server elsewhere: it loads model and data once and answers tasks."""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedmllm.algorithms import Algorithm, build_algorithm
from fedmllm.benchmark.resident import Resident
from fedmllm.config import Experiment
from fedmllm.data.federated import spread
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.engine.flower import enclose, enclosed
from fedmllm.engine.in_process import Assignment, InProcessEngine
from fedmllm.engine.messages import Task, read_task, write_answer
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.types import Answer, Broadcast, ClientFailure, Sample

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp


@dataclass(frozen=True)
class _Opened:
    """A run's part at this worker.

    Attributes:
        experiment: its settings.
        engine: trains a client here.
        algorithm: the method.
        own: the broadcast of its state before the first round.
        clients: whom it can be asked for.
    """

    experiment: Experiment
    engine: InProcessEngine
    algorithm: Algorithm
    own: Broadcast
    clients: Mapping[str, tuple[Sample, ...]]

    def train(self, task: Task, states: ClientStates) -> Answer:
        """One client's turn."""
        facts = task.facts
        assignment = Assignment(
            task.broadcast(self.own),
            self.algorithm,
            facts.learning_rate,
            facts.seed,
            states,
            {} if facts.rank is None else {facts.client: facts.rank},
            self.experiment.compression,
        )
        (answer,) = self.engine.map_clients(assignment, {facts.client: self.clients[facts.client]})
        return answer


class Worker:
    """Answers tasks, one after another."""

    def __init__(self) -> None:
        self._resident, self._opened, self._settings = Resident(), ExitStack(), ""
        self._run: _Opened | None = None

    def close(self) -> None:
        """Let go of the run."""
        self._run, self._settings = None, ""
        self._opened.close()

    def answer(self, content: bytes) -> bytes:
        """An update, or what went wrong: a worker outlives what a task does to it."""
        task = read_task(content)
        facts = task.facts
        try:
            states = ClientStates(Path(facts.about["states"]))
            answer = self._open(facts.about["experiment"]).train(task, states)
            return write_answer(answer, facts.round_num)
        except Exception as error:
            return write_answer(ClientFailure(facts.client, f"{type(error).__name__}: {error}"), facts.round_num)

    def _open(self, settings: str) -> _Opened:
        """The run of these settings; another than the last is set up anew, with model and data as far as they are the same."""
        if self._run is None or settings != self._settings:
            self.close()
            self._run, self._settings = self._set_up(Experiment.from_yaml(settings)), settings
        return self._run

    def _set_up(self, experiment: Experiment) -> _Opened:
        torch.set_num_threads(max(1, int(experiment.engine.worker_cpus)))
        data = spread(self._resident.dataset(experiment), experiment.federation, experiment.seed)
        vlm, _ = self._opened.enter_context(self._resident.model(experiment))
        method = build_algorithm(experiment.algorithm)
        own = method.broadcast(method.init(read_weights(vlm.model), frozen_weights(vlm)))
        engine = InProcessEngine(vlm, self._resident.encoder(experiment), experiment.training)
        return _Opened(experiment, engine, method, own, data.clients)


_WORKER: list[Worker] = []
"""This process's."""


def simulated() -> ClientApp:
    """What Flower's simulation runs at every node, in as many processes as it has workers."""
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(enclose(resident_worker().answer(enclosed(message.content))), reply_to=message)

    return app


def resident_worker() -> Worker:
    """The one of this process, made when it is first asked for."""
    if not _WORKER:
        _WORKER.append(Worker())
        atexit.register(_WORKER[0].close)
    return _WORKER[0]
