"""A worker process, which trains clients for a server. It loads model and data once and then answers tasks."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedmllm.algorithms import Algorithm, ServerState, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import spread
from fedmllm.data.modalities import profile
from fedmllm.data.test_copies import reduced_copy
from fedmllm.engine.base import Assignment
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.engine.compression import compression
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.errors import ConfigError
from fedmllm.evaluation.evaluate import evaluate
from fedmllm.flower.carrier import enclose, enclosed
from fedmllm.flower.facts import VALIDATION, Presence, Scores, write_message
from fedmllm.flower.frozen import KeptBase
from fedmllm.flower.messages import Task, TaskFacts, read_task, write_answer
from fedmllm.models.lora import frozen_weights, read_weights, write_base, write_weights
from fedmllm.models.saved import save_adapter
from fedmllm.run.encodable import usable
from fedmllm.run.resident import Resident
from fedmllm.types import BASE, Answer, Broadcast, ClientFailure, Metrics, Sample

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

Clients = Mapping[str, tuple[Sample, ...]]


@dataclass(frozen=True)
class _Opened:
    """A run that is set up in this worker.

    Attributes:
        experiment: the run's settings.
        engine: trains clients in this process.
        algorithm: the method.
        own: the broadcast of the method's state before the first round.
        clients: training samples of the clients that this worker trains, by client.
        test, validation: the splits on which models are scored.
        metric: the headline metric.
        taken: samples that the model can encode, by (``client``, client) or (``split``, split); computed once per run.
    """

    experiment: Experiment
    engine: InProcessEngine
    algorithm: Algorithm
    own: Broadcast
    clients: Clients
    test: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    metric: str
    taken: dict[tuple[str, str], tuple[Sample, ...]] = field(default_factory=dict)

    def samples(self, client: str) -> tuple[Sample, ...]:
        """Return a client's training samples that the model can encode."""
        if client not in self.clients:
            raise LookupError(f"{client!r} is not a client of this worker, which has {', '.join(self.clients)}")
        return self._taken("client", client, self.clients[client])

    def _taken(self, kind: str, name: str, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        if (kind, name) not in self.taken:
            self.taken[kind, name] = usable(samples, self.engine.encoder, self.experiment.data.on_bad_sample)
        return self.taken[kind, name]

    def train(self, task: Task, states: ClientStates) -> Answer:
        """Train one client and return its answer."""
        client = task.facts.client
        self.engine.submit(self._assignment(task, states), {client: self.samples(client)})
        (answer,) = self.engine.completed()
        return answer

    def personal(self, task: Task, states: ClientStates) -> ServerState:
        """Return a client's personalized model: its weights, and the change merged into the frozen weights."""
        assignment = self._assignment(task, states)
        received = assignment.broadcast
        return ServerState(assignment.personal(task.facts.client), received.round_num, {BASE: received.base})

    def _assignment(self, task: Task, states: ClientStates) -> Assignment:
        """Rebuild the assignment that the server sent."""
        facts = task.facts
        return Assignment(
            _received(task, self.own, states),
            self.algorithm,
            facts.learning_rate,
            facts.seed,
            states,
            {} if facts.rank is None else {facts.client: facts.rank},
            compression(self.experiment.compression),
            accepted={facts.client: facts.accepted},
        )

    def score(self, model: ServerState, samples: Sequence[Sample], split: str) -> Metrics:
        """Score a model.

        Args:
            model: the weights, and the change merged into the frozen weights.
            samples: the validation split or the test split.
            split: ``VALIDATION``, empty for the test split, or the name of a copy of the test split.
        """
        vlm, settings = self.engine.vlm, self.experiment.evaluation
        write_base(vlm, model.base)
        write_weights(vlm.model, model.weights)
        whole = self._taken("split", VALIDATION if split == VALIDATION else "test", samples)
        held = whole if split in ("", VALIDATION) else reduced_copy(whole, split, self.experiment.seed)
        return evaluate(vlm, held, self.engine.encoder, self.metric, settings, self.experiment.seed)


def _received(task: Task, own: Broadcast, states: ClientStates) -> Broadcast:
    """Return a task's broadcast. The change to the frozen weights is stored in a folder next to the client states."""
    return task.broadcast(own, KeptBase(states.folder.with_name(states.folder.name + "-base")))


class Worker:
    """Answers tasks one after another.

    This class trains clients of the experiment's own split. The task names the folder for what clients keep.
    """

    def __init__(self) -> None:
        self.resident = Resident()
        self._opened, self._settings = ExitStack(), ""
        self._run: _Opened | None = None

    def experiment(self, settings: str) -> Experiment:
        """Return the experiment that this worker runs for the server's settings."""
        return Experiment.from_yaml(settings)

    def clients(self, experiment: Experiment) -> Clients:
        """Return the clients that this worker trains, with their samples."""
        return spread(self.resident.dataset(experiment), experiment.federation, experiment.seed).clients

    def test(self, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """Return the samples of a test or validation split on which a personalized model is scored."""
        return samples

    def states(self, facts: TaskFacts) -> ClientStates:
        """Return the store of what clients keep between rounds."""
        return ClientStates(Path(facts.about["states"]))

    def require(self, facts: TaskFacts) -> None:
        """Raise an error if this worker cannot perform a task. Subclasses override it."""

    def reported(self, presence: Presence) -> Presence:
        """Return the presence message to send to the server. Subclasses may withhold fields."""
        return presence

    def sent(self, answer: Answer, facts: TaskFacts) -> Answer:
        """Return the answer to send to the server. Subclasses may withhold fields."""
        return answer

    def scored(self, scores: Scores, facts: TaskFacts, model: ServerState) -> Scores | ClientFailure:
        """Return the scores of a personalized model to send to the server. Subclasses may withhold them."""
        return scores

    def failed(self, client: str, error: Exception) -> ClientFailure:
        """Return the failure to send to the server for an error."""
        return ClientFailure(client, f"{type(error).__name__}: {error}")

    def answer(self, content: bytes) -> bytes:
        """Train a client and return its update as a message. An error becomes a failure message, and the worker continues."""
        task = read_task(content)
        facts = task.facts
        try:
            self.require(facts)
            answer = self._open(facts).train(task, self.states(facts))
            return write_answer(self.sent(answer, facts), facts.round_num)
        except Exception as error:
            return write_answer(self.failed(facts.client, error), facts.round_num)

    def present(self, content: bytes) -> bytes:
        """Return a client's presence message after loading model and data. A new run starts with it, so the data are read again."""
        facts = read_task(content).facts
        try:
            self.close()
            samples = self._open(facts).samples(facts.client)
            counted = dict(profile(samples))
            presence = Presence(client=facts.client, num_samples=len(samples), profile=counted, rank=None, trial=True)
            return write_message(self.reported(presence))
        except Exception as error:
            return write_message(self.failed(facts.client, error))

    def score(self, content: bytes) -> bytes:
        """Score a client's personalized model and return the scores as a message."""
        task = read_task(content)
        facts = task.facts
        try:
            self.require(facts)
            run = self._open(facts)
            model = run.personal(task, self.states(facts))
            split = str(facts.about["tested"])
            metrics = run.score(model, self._split(run, split), split)
            scores = Scores(client=facts.client, round_num=facts.round_num, metric=run.metric, metrics=metrics)
            return write_message(self.scored(scores, facts, model), facts.round_num)
        except Exception as error:
            return write_message(self.failed(facts.client, error), facts.round_num)

    def _split(self, run: _Opened, split: str) -> tuple[Sample, ...]:
        """Return the samples on which to score a personalized model."""
        if split != VALIDATION:
            return self.test(run.test)
        if not run.validation:
            remedy = "set data.validation_share above 0, name a validation file, or set evaluation.every=0 in the experiment"
            raise ConfigError(f"the data have no validation split; {remedy}")
        return self.test(run.validation)

    def _open(self, facts: TaskFacts) -> _Opened:
        """Return the run with a task's settings. If the settings have changed, set it up again with the cached model and data that still apply."""
        settings = str(facts.about["experiment"])
        if self._run is None or settings != self._settings:
            self.close()
            self._run, self._settings = self._set_up(self.experiment(settings)), settings
        return self._run

    def _set_up(self, experiment: Experiment) -> _Opened:
        torch.set_num_threads(max(1, int(experiment.engine.worker_cpus)))
        clients = self.clients(experiment)
        vlm, _ = self._opened.enter_context(self.resident.model(experiment))
        method = build_algorithm(experiment.algorithm)
        own = method.broadcast(method.init(read_weights(vlm.model), frozen_weights(vlm)))
        engine = InProcessEngine(vlm, self.resident.encoder(experiment), experiment.training)
        dataset = self.resident.dataset(experiment)
        return _Opened(experiment, engine, method, own, clients, dataset.test, dataset.validation, dataset.metric)

    def save(self, model: ServerState, folder: Path) -> None:
        """Save a client's personalized model of the open run as an adapter."""
        if self._run is not None:
            folder.parent.mkdir(exist_ok=True)
            save_adapter(self._run.engine.vlm, model.weights, folder, model.base)

    def close(self) -> None:
        """Release the run's resources. The resident model and data stay cached."""
        self._run, self._settings = None, ""
        self._opened.close()


def client_app(worker: Callable[[], Worker]) -> ClientApp:
    """Return the ClientApp that Flower runs on a node.

    Args:
        worker: returns the worker of this process.
    """
    from flwr.app import Context, Message
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(enclose(worker().answer(enclosed(message.content))), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(enclose(worker().score(enclosed(message.content))), reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(enclose(worker().present(enclosed(message.content))), reply_to=message)

    return app


_WORKER: list[Worker] = []
"""The worker of this process, once it exists."""


def resident_worker() -> Worker:
    """Return the worker of this process. The first call creates it."""
    if not _WORKER:
        _WORKER.append(Worker())
        atexit.register(_WORKER[0].close)
    return _WORKER[0]
