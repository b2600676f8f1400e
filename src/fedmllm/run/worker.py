"""A process that trains clients for a server elsewhere: it loads model and data once and answers what it is asked."""

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
from fedmllm.flower.facts import VALIDATION, Presence, Scores, write_word
from fedmllm.flower.frozen import KeptBase
from fedmllm.flower.messages import Task, TaskFacts, read_task, write_answer
from fedmllm.models.lora import frozen_weights, read_weights, write_base, write_weights
from fedmllm.models.saved import save_adapter
from fedmllm.run.encodable import usable
from fedmllm.run.resident import Resident
from fedmllm.types import Answer, Broadcast, ClientFailure, Metrics, Sample

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

Clients = Mapping[str, tuple[Sample, ...]]


@dataclass(frozen=True)
class _Opened:
    """A run's part at this worker.

    Attributes:
        experiment: its settings.
        engine: trains a client here.
        algorithm: the method.
        own: the broadcast of its state before the first round.
        clients: whom it can be asked for.
        test, validation: the splits that models are scored on.
        metric: its score.
        taken: what of clients and splits the model takes, looked at once and not in every task.
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
        """Of a client."""
        if client not in self.clients:
            raise LookupError(f"{client!r} is no client of this worker; it has {', '.join(self.clients)}")
        return self._taken("client", client, self.clients[client])

    def _taken(self, kind: str, name: str, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        if (kind, name) not in self.taken:
            self.taken[kind, name] = usable(samples, self.engine.encoder, self.experiment.data.on_bad_sample)
        return self.taken[kind, name]

    def train(self, task: Task, states: ClientStates) -> Answer:
        """One client's turn."""
        client = task.facts.client
        self.engine.submit(self._assignment(task, states), {client: self.samples(client)})
        (answer,) = self.engine.completed()
        return answer

    def personal(self, task: Task, states: ClientStates) -> ServerState:
        """The model that a client ends with: the weights, and what was merged into the frozen ones."""
        assignment = self._assignment(task, states)
        received = assignment.broadcast
        return ServerState(assignment.personal(task.facts.client), received.round_num, {"base": received.base})

    def _assignment(self, task: Task, states: ClientStates) -> Assignment:
        """A task as the server meant it."""
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

    def score(self, model: ServerState, samples: Sequence[Sample], asked: str) -> Metrics:
        """Of a model on the validation part (``VALIDATION``), the test split (empty) or a copy of it."""
        vlm, settings = self.engine.vlm, self.experiment.evaluation
        write_base(vlm, model.base)
        write_weights(vlm.model, model.weights)
        whole = self._taken("split", VALIDATION if asked == VALIDATION else "test", samples)
        held = whole if asked in ("", VALIDATION) else reduced_copy(whole, asked, self.experiment.seed)
        return evaluate(vlm, held, self.engine.encoder, self.metric, settings, self.experiment.seed)


def _received(task: Task, own: Broadcast, states: ClientStates) -> Broadcast:
    """A task's broadcast. What was merged into the frozen weights is kept beside what clients keep."""
    return task.broadcast(own, KeptBase(states.folder.with_name(states.folder.name + "-base")))


class Worker:
    """Answers tasks, one after another. This one trains clients of the experiment's own split; what they keep is where the task says."""

    def __init__(self) -> None:
        self.resident = Resident()
        self._opened, self._settings = ExitStack(), ""
        self._run: _Opened | None = None

    def experiment(self, settings: str) -> Experiment:
        """What the server's settings mean here."""
        return Experiment.from_yaml(settings)

    def clients(self, experiment: Experiment) -> Clients:
        """Whom it trains."""
        return spread(self.resident.dataset(experiment), experiment.federation, experiment.seed).clients

    def test(self, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """What of a test split, or a validation part, a client's own model is scored on."""
        return samples

    def states(self, facts: TaskFacts) -> ClientStates:
        """Where clients keep what is their own."""
        return ClientStates(Path(facts.about["states"]))

    def require(self, facts: TaskFacts) -> None:
        """Refuse a task that does not suit this worker."""

    def told(self, presence: Presence) -> Presence:
        """What the server is told of a client."""
        return presence

    def sent(self, answer: Answer, facts: TaskFacts) -> Answer:
        """What the server is sent."""
        return answer

    def scored(self, scores: Scores, facts: TaskFacts, model: ServerState) -> Scores | ClientFailure:
        """What the server is told of a client's own model."""
        return scores

    def failed(self, client: str, error: Exception) -> ClientFailure:
        """What the server is told of an error."""
        return ClientFailure(client, f"{type(error).__name__}: {error}")

    def answer(self, content: bytes) -> bytes:
        """An update, or what went wrong: a worker outlives what a task does to it."""
        task = read_task(content)
        facts = task.facts
        try:
            self.require(facts)
            answer = self._open(facts).train(task, self.states(facts))
            return write_answer(self.sent(answer, facts), facts.round_num)
        except Exception as error:
            return write_answer(self.failed(facts.client, error), facts.round_num)

    def present(self, content: bytes) -> bytes:
        """A client's word about itself, once model and data are there; with it a run begins, on the data as they are now."""
        facts = read_task(content).facts
        try:
            self.close()
            samples = self._open(facts).samples(facts.client)
            counted = dict(profile(samples))
            presence = Presence(client=facts.client, num_samples=len(samples), profile=counted, rank=None, trial=True)
            return write_word(self.told(presence))
        except Exception as error:
            return write_word(self.failed(facts.client, error))

    def score(self, content: bytes) -> bytes:
        """How a client's own model scores where it is."""
        task = read_task(content)
        facts = task.facts
        try:
            self.require(facts)
            run = self._open(facts)
            model = run.personal(task, self.states(facts))
            asked = str(facts.about["tested"])
            metrics = run.score(model, self._split(run, asked), asked)
            word = Scores(client=facts.client, round_num=facts.round_num, metric=run.metric, metrics=metrics)
            return write_word(self.scored(word, facts, model), facts.round_num)
        except Exception as error:
            return write_word(self.failed(facts.client, error), facts.round_num)

    def _split(self, run: _Opened, asked: str) -> tuple[Sample, ...]:
        """Samples to score a client's own model on."""
        if asked != VALIDATION:
            return self.test(run.test)
        if not run.validation:
            remedy = "set data.validation_share above 0 or name a file for it, or evaluation.every=0 in the experiment"
            raise ConfigError(f"there is no validation part here; {remedy}")
        return self.test(run.validation)

    def _open(self, facts: TaskFacts) -> _Opened:
        """The run of these settings; another than the last is set up anew, with model and data as far as they are the same."""
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
        """A client's own model of the run that is open, as an adapter."""
        if self._run is not None:
            folder.parent.mkdir(exist_ok=True)
            save_adapter(self._run.engine.vlm, model.weights, folder, model.base)

    def close(self) -> None:
        """Let go of the run."""
        self._run, self._settings = None, ""
        self._opened.close()


def client_app(worker: Callable[[], Worker]) -> ClientApp:
    """What Flower runs at a node.

    Args:
        worker: gives this process's.
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
"""This process's."""


def resident_worker() -> Worker:
    """The one of this process, made when it is first asked for."""
    if not _WORKER:
        _WORKER.append(Worker())
        atexit.register(_WORKER[0].close)
    return _WORKER[0]
