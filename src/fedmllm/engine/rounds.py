"""The one round loop: ask clients, check and aggregate what they send, step, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import Algorithm, ServerState, UpdateTransform
from fedmllm.engine.base import Assignment, Engine, Split
from fedmllm.engine.checkpoint import BackgroundCheckpoint, RunStore
from fedmllm.engine.failures import NONE_EXPECTED, FailureConfig
from fedmllm.engine.intake import Intake, Origin
from fedmllm.engine.observer import UNOBSERVED, Observer
from fedmllm.engine.schedules import SYNCHRONOUS, Schedule
from fedmllm.engine.scores import evaluate_state, validate_state
from fedmllm.engine.stages import Stage
from fedmllm.errors import FederationError
from fedmllm.training.settings import TrainingConfig, reach, round_learning_rate
from fedmllm.types import Answer, Broadcast, Record


@dataclass(frozen=True)
class Loop:
    """What the loop works with, the same for all stages of a run.

    Attributes:
        algorithm: the method.
        engine: trains clients.
        training: for the schedule of the learning rate.
        test: the split that the end is scored on.
        store: where rounds are kept.
        seed: the experiment's.
        transforms: what happens to updates besides what the method has done to them.
        failures: what to do about clients that fail.
        observer: told about the progress.
        validation: the split that rounds are scored on; None where there is none.
        schedule: who is asked when, and when the server steps.
    """

    algorithm: Algorithm
    engine: Engine
    training: TrainingConfig
    test: Split
    store: RunStore
    seed: int
    transforms: tuple[UpdateTransform, ...] = ()
    failures: FailureConfig = NONE_EXPECTED
    observer: Observer = UNOBSERVED
    validation: Split | None = None
    schedule: Schedule = SYNCHRONOUS

    def assignment(self, stage: Stage, state: ServerState) -> Assignment:
        """What clients are asked to do with a state of the server."""
        learning_rate = round_learning_rate(self.training, state.round_num, stage.num_rounds)
        return Assignment(
            self.algorithm.broadcast(state),
            self.algorithm,
            learning_rate,
            self.seed,
            self.store.client_states(stage.name),
            stage.ranks,
            self.transforms,
            self.failures.deadline,
            state.accepted,
        )


class Round:
    """A round while it runs: a schedule asks clients and takes their answers through it.

    Args:
        loop: what to work with.
        stage: whom to train.
        state: the server's, at the start of the round.
        watch: books the time.
    """

    def __init__(self, loop: Loop, stage: Stage, state: ServerState, watch: Watch) -> None:
        self.loop, self.stage, self.state, self._watch = loop, stage, state, watch
        self.assignment = loop.assignment(stage, state)
        self.intake = Intake(loop.algorithm, state, stage.ranks, self.assignment.chain, stage.claim)
        self.clients: list[str] = []
        """Whose answers were taken."""
        self.facts: Record = {}
        """What the schedule adds to the round's record."""
        self._origins: dict[int, Origin] = {}

    @property
    def needed(self) -> int:
        """Updates that make the round complete."""
        return self.loop.failures.needed(self.loop.algorithm.smallest_cohort, self.loop.schedule.updates(self.stage))

    @property
    def complete(self) -> bool:
        """Whether there are as many."""
        return len(self.intake.accepted) >= self.needed

    def tell(self, outstanding: Sequence[str]) -> None:
        """Tell who has not answered yet."""
        self.loop.observer.answered({"stage": self.stage.name, "round": self.state.round_num + 1, "clients": list(outstanding)})

    def take(self, answer: Answer, sent: ServerState | None = None, scale: float = 1.0) -> None:
        """Take an answer to a state that clients were sent, this round's by default."""
        self._watch.lap("train")
        self.intake.take(answer, replace(self._origin(sent or self.state), scale=scale))
        if answer.client not in self.clients:
            self.clients.append(answer.client)
        self._watch.lap("aggregate")

    def _origin(self, sent: ServerState) -> Origin:
        """By round, for a bound on norms takes a pass over all weights."""
        if sent.round_num not in self._origins:
            assignment = self.assignment if sent is self.state else self.loop.assignment(self.stage, sent)
            self._origins[sent.round_num] = Origin(sent, largest_norm(self.loop, assignment))
        return self._origins[sent.round_num]

    def again(self, attempt: int, clients: Sequence[str]) -> None:
        """Wait, and tell why, before clients are asked again."""
        told = {"stage": self.stage.name, "round": self.state.round_num + 1, "attempt": attempt, "clients": list(clients)}
        self.loop.observer.waiting(told)
        time.sleep(self.loop.failures.pause)

    def too_few(self) -> None:
        """Leave the round incomplete, if the run is to go on without.

        Raises:
            FederationError: if it is not.
        """
        if self.loop.failures.below != "skip":
            raise FederationError(self.intake.missing(self.stage.name, self.needed))


def run_stage(loop: Loop, stage: Stage, initial: ServerState) -> ServerState:
    """Train a stage to its last round, from its checkpoint if it has one.

    Args:
        loop: what to work with.
        stage: whom to train.
        initial: the method's state before the first round.

    Raises:
        FederationError: if in some round too few clients' updates can be used, and the run is not to go on without.
    """
    population = stage.population if loop.algorithm.needs_labels else replace(stage.population, labels={})
    state = replace(loop.store.load_state(stage.name) or initial, population=population)
    loop.store.rewind(stage.name, state.round_num)
    watch = Watch()
    loop.schedule.resume(loop, stage, state)
    try:
        with BackgroundCheckpoint(loop.store, stage.name) as checkpoint:
            while state.round_num < stage.num_rounds:
                state = _round(Round(loop, stage, state, watch), watch, checkpoint)
    finally:
        loop.engine.cancel()
    return state


def _round(this: Round, watch: Watch, checkpoint: BackgroundCheckpoint) -> ServerState:
    """One round, from the first client asked to the checkpoint."""
    loop, stage, before, intake = this.loop, this.stage, this.state, this.intake
    left = loop.schedule.collect(this)
    state = _stepped(loop.algorithm, before, intake) if this.complete else _skipped(before)
    state = replace(state, outstanding=left)
    watch.lap("aggregate")
    validation = validate_state(loop, stage, state) if stage.validates(state.round_num) else None
    scores = evaluate_state(loop, stage, state) if stage.ends(state.round_num) else None
    watch.lap("evaluate")
    record = {
        "stage": stage.name,
        "round": state.round_num,
        "clients": sorted(this.clients),
        "learning_rate": this.assignment.learning_rate,
        "skipped": not this.complete,
        **intake.record(),
        **this.facts,
        "score": scores["score"] if scores else None,
        "scores": scores,
        "validation": validation,
        "bytes_down": _bytes_down(loop.algorithm, stage, before, this.assignment.broadcast, intake.reached),
    }
    record["seconds"] = watch.reset()
    # The line first, then the state: a line whose state is missing is rewound, a state whose line is missing would stay a gap.
    loop.store.append(record)
    checkpoint.save(state)
    watch.lap("checkpoint")
    loop.observer.round_done(record | {"num_rounds": stage.num_rounds})
    return state


def largest_norm(loop: Loop, assignment: Assignment) -> Callable[[str, int], float] | None:
    """The largest norm that is accepted, of an update or of what the method sends besides; None for any.

    What was received counts in: a method may make parts of it zero. Besides, methods send gradients, which have no such bound; those of a mean
    negative log-likelihood are far below one in each entry.
    """
    factor, weights = loop.failures.norm_limit, assignment.broadcast.weights
    if factor is None:
        return None
    size, entries = W.norm(weights), sum(tensor.numel() for tensor in weights.values())

    def largest(kind: str, count: int) -> float:
        return factor * (math.sqrt(entries) if kind != "update" else reach(loop.training, assignment.learning_rate, count, entries) + size)

    return largest


def _stepped(algorithm: Algorithm, state: ServerState, intake: Intake) -> ServerState:
    """The state after a round, which says whose updates are in it: these clients keep what they kept of it."""
    accepted = {client: [*state.accepted.get(client, ()), trained_from][-2:] for client, trained_from in intake.accepted.items()}
    return replace(algorithm.server_step(state, intake.aggregate()), accepted=dict(sorted({**state.accepted, **accepted}.items())))


def _skipped(state: ServerState) -> ServerState:
    """One round later, with nothing changed, and so with nothing new to be sent of the frozen weights' change; no client's update counts."""
    return replace(state, round_num=state.round_num + 1, slots={kind: slot for kind, slot in state.slots.items() if kind != "base_step"})


def _bytes_down(algorithm: Algorithm, stage: Stage, state: ServerState, broadcast: Broadcast, cohort: Sequence[str]) -> int:
    """What the cohort is sent, and what all clients must be sent of the last round's change to the frozen weights."""
    sent = {name: tensor for name, tensor in broadcast.weights.items() if algorithm.downloads(name)}
    extras = {f"{kind}/{n}": tensor for kind, tensors in broadcast.extras.items() for n, tensor in tensors.items()}
    further = {name: tensor for name, tensor in extras.items() if algorithm.downloads(name)}
    own = sum(W.num_bytes(factors.cut(sent, stage.ranks.get(name)), further) for name in cohort)
    return own + len(stage.clients) * W.num_bytes(state.slots.get("base_step", {}))


class Watch:
    """Seconds by activity, from lap to lap. A round's checkpoint comes after its line and is booked on the next one."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds = dict.fromkeys(("train", "aggregate", "evaluate", "checkpoint"), 0.0)

    def reset(self) -> dict[str, float]:
        """The seconds so far; counting starts again at zero."""
        before, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return before

    def lap(self, name: str) -> None:
        """Book the time since the last lap under a name."""
        now = time.perf_counter()
        self.seconds[name] += now - self._last
        self._last = now
