"""A worker process, which trains clients for a server. It loads model and data once and then answers tasks."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedmllm.algorithms import ServerState, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import spread
from fedmllm.data.modalities import profile
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.parties import Parties
from fedmllm.errors import ConfigError, FederationError
from fedmllm.flower.carrier import enclose, enclosed
from fedmllm.flower.facts import VALIDATION, Presence, Scores, write_message
from fedmllm.flower.messages import TaskFacts, read_task, write_answer
from fedmllm.flower.sessions import SESSION, StageFacts, read_down, read_stage
from fedmllm.models.lora import frozen_weights, read_weights
from fedmllm.models.saved import save_adapter
from fedmllm.privacy.ledger import Ledger
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.sample_level import SampleBudget
from fedmllm.privacy.secagg.messages import Message as Answered
from fedmllm.privacy.secagg.messages import write
from fedmllm.run.open_run import Clients, OpenRun
from fedmllm.run.resident import Resident
from fedmllm.training.private import PrivateSteps
from fedmllm.types import Answer, ClientFailure, Sample

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp


class Worker:
    """Answers tasks one after another.

    This class trains clients of the experiment's own split. The task names the folder for what clients keep.
    """

    def __init__(self) -> None:
        self.resident = Resident()
        self._opened, self._settings = ExitStack(), ""
        self._run: OpenRun | None = None

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

    def private(self, run: OpenRun, facts: TaskFacts) -> PrivateSteps | None:
        """Return how this task's training protects single samples; None if it does not. The server sends the noise that all clients need."""
        config = run.experiment.privacy
        if config.unit != "sample":
            return None
        ledger, multiplier = Ledger(Path(facts.about["ledger"])), float(facts.about["noise_multiplier"])
        budget = SampleBudget(ledger, multiplier, config.target_epsilon, config.target_delta)
        return budget.steps(config.clip_norm, Noise(config.noise_seed))

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

    def parties(self, experiment: Experiment) -> Parties | None:
        """Return this worker's clients in sessions of secure aggregation. Only sites have keys for it."""
        return None

    def session(self, content: bytes) -> bytes:
        """Answer a stage of a session of secure aggregation. An error becomes a failure message, and the worker continues."""
        facts, message = read_stage(content)
        try:
            return self.passed_on(facts, write(self._stage(facts, message)))
        except Exception as error:
            failure = self.failed(facts.client, error)
            return self.passed_on(facts, write_message(failure, facts.round_num), failure.reason)

    def _stage(self, facts: StageFacts, message: bytes) -> Answered:
        """Return a client's answer to a stage's message."""
        parties = None if self._run is None else self._run.engine.parties
        if parties is None:
            raise FederationError(
                f"{facts.client} holds no update: it restarted after it had trained, or trained without secure_aggregation"
            )
        self.admit(parties, facts)
        return parties.answer(facts.client, facts.step, read_down(facts.step, message, len(parties.sites)))

    def admit(self, parties: Parties, facts: StageFacts) -> None:
        """Check the signed list of sites, if a message brings it. Subclasses override it."""

    def passed_on(self, facts: StageFacts, content: bytes, failure: str = "") -> bytes:
        """Return the bytes of an answer or failure to send to the server. Subclasses record them."""
        return content

    def failed(self, client: str, error: Exception) -> ClientFailure:
        """Return the failure to send to the server for an error."""
        return ClientFailure(client, f"{type(error).__name__}: {error}")

    def answer(self, content: bytes) -> bytes:
        """Train a client and return its update as a message. An error becomes a failure message, and the worker continues."""
        task = read_task(content)
        facts = task.facts
        try:
            self.require(facts)
            run = self._open(facts)
            run.engine.private = self.private(run, facts)
            answer = run.train(task, self.states(facts))
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

    def _split(self, run: OpenRun, split: str) -> tuple[Sample, ...]:
        """Return the samples on which to score a personalized model."""
        if split != VALIDATION:
            return self.test(run.test)
        if not run.validation:
            remedy = "set data.validation_share above 0, name a validation file, or set evaluation.every=0 in the experiment"
            raise ConfigError(f"the data have no validation split; {remedy}")
        return self.test(run.validation)

    def _open(self, facts: TaskFacts) -> OpenRun:
        """Return the run with a task's settings. If the settings have changed, set it up again with the cached model and data that still apply."""
        settings = str(facts.about["experiment"])
        if self._run is None or settings != self._settings:
            self.close()
            self._run, self._settings = self._set_up(self.experiment(settings)), settings
        return self._run

    def _set_up(self, experiment: Experiment) -> OpenRun:
        torch.set_num_threads(max(1, int(experiment.engine.worker_cpus)))
        clients = self.clients(experiment)
        vlm, _ = self._opened.enter_context(self.resident.model(experiment))
        method = build_algorithm(experiment.algorithm)
        own = method.broadcast(method.init(read_weights(vlm.model), frozen_weights(vlm)))
        engine = InProcessEngine(vlm, self.resident.encoder(experiment), experiment.training, parties=self.parties(experiment))
        dataset = self.resident.dataset(experiment)
        return OpenRun(experiment, engine, method, own, clients, dataset.test, dataset.validation, dataset.metric)

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

    @app.train(SESSION.partition(".")[2])
    def session(message: Message, context: Context) -> Message:
        return Message(enclose(worker().session(enclosed(message.content))), reply_to=message)

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
