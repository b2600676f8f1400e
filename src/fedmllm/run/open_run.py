"""A run that is set up in a worker process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmllm.algorithms import Algorithm, ServerState
from fedmllm.config import Experiment
from fedmllm.data.test_copies import reduced_copy
from fedmllm.engine.base import Assignment
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.engine.compression import compression
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.flower.facts import VALIDATION
from fedmllm.flower.frozen import KeptBase
from fedmllm.flower.messages import Task
from fedmllm.privacy.secagg.messages import RoundId
from fedmllm.run.encodable import usable
from fedmllm.run.splits import Splits
from fedmllm.types import BASE, Answer, Broadcast, Metrics, Sample

Clients = Mapping[str, tuple[Sample, ...]]


@dataclass(frozen=True)
class OpenRun:
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
            secure=self._secure(task),
        )

    def _secure(self, task: Task) -> RoundId | None:
        """Return the round for which the client holds its update back; None if it sends it."""
        if not self.experiment.privacy.secure_aggregation:
            return None
        return RoundId(str(task.facts.about["run"]), task.facts.stage, task.facts.round_num)

    def score(self, model: ServerState, samples: Sequence[Sample], split: str) -> Metrics:
        """Score a model.

        Args:
            model: the weights, and the change merged into the frozen weights.
            samples: the validation split or the test split.
            split: ``VALIDATION``, empty for the test split, or the name of a copy of the test split.
        """
        whole = self._taken("split", VALIDATION if split == VALIDATION else "test", samples)
        held = whole if split in ("", VALIDATION) else reduced_copy(whole, split, self.experiment.seed)
        splits = Splits(self.engine.vlm, self.engine.encoder, self.experiment, self.metric)
        return splits.scorer(held, self.metric)(model.weights, model.base)


def _received(task: Task, own: Broadcast, states: ClientStates) -> Broadcast:
    """Return a task's broadcast. The change to the frozen weights is stored in a folder next to the client states."""
    return task.broadcast(own, KeptBase(states.folder.with_name(states.folder.name + "-base")))
