"""The one round loop: sample a cohort, broadcast, train, check and aggregate, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import Algorithm, ServerState
from fedmllm.engine.checkpoint import BackgroundCheckpoint, RunStore
from fedmllm.engine.compression import UNCOMPRESSED, CompressionConfig
from fedmllm.engine.failures import NONE_EXPECTED, FailureConfig
from fedmllm.engine.in_process import Assignment
from fedmllm.engine.intake import Intake
from fedmllm.engine.stages import Stage
from fedmllm.errors import FederationError
from fedmllm.evaluation.metrics import error_over_models, over_models
from fedmllm.training.local import TrainingConfig, reach, round_learning_rate
from fedmllm.types import Answer, Broadcast, ClientFailure, Metrics, Record, Sample, Weights


class Engine(Protocol):
    """Runs the client rule over a cohort."""

    def map_clients(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[Answer]:
        """One answer per client, in the clients' order."""
        ...


@dataclass(frozen=True)
class Loop:
    """What the loop works with, the same for all stages of a run.

    Attributes:
        algorithm: the method.
        engine: runs the clients.
        training: for the schedule of the learning rate.
        evaluate: scores given weights, together with what has been merged into the frozen ones, on the test split.
        validate: the same on the validation part; None where there is none.
        store: where rounds are kept.
        seed: the experiment's.
        on_round: told each round's record.
        compression: how clients write their updates.
        failures: what to do about clients that fail.
        on_wait: told ``stage``, ``round``, ``attempt`` and ``clients`` when clients are asked again.
        scores: the scores of clients' own models, where those are elsewhere, by client; None where they are here.
        validations: the same on validation parts.
        on_answer: told ``stage``, ``round`` and ``clients``, those that are still waited for, when clients are asked and at each answer.
    """

    algorithm: Algorithm
    engine: Engine
    training: TrainingConfig
    evaluate: Callable[[Weights, Weights], Metrics]
    store: RunStore
    seed: int
    on_round: Callable[[Record], None] = field(default=lambda record: None)
    compression: CompressionConfig = UNCOMPRESSED
    failures: FailureConfig = NONE_EXPECTED
    on_wait: Callable[[Record], None] = field(default=lambda record: None)
    on_answer: Callable[[Record], None] = field(default=lambda record: None)
    scores: Callable[[Assignment, Sequence[str]], Mapping[str, Metrics]] | None = None
    validate: Callable[[Weights, Weights], Metrics] | None = None
    validations: Callable[[Assignment, Sequence[str]], Mapping[str, Metrics]] | None = None


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
    watch = _Watch()
    with BackgroundCheckpoint(loop.store, stage.name) as checkpoint:
        while state.round_num < stage.num_rounds:
            state = _round(loop, stage, state, watch, checkpoint)
    return state


def _round(loop: Loop, stage: Stage, state: ServerState, watch: _Watch, checkpoint: BackgroundCheckpoint) -> ServerState:
    """One round, from the cohort to the checkpoint."""
    cohort, before = stage.cohort(loop.seed, state.round_num), state
    assignment = _assignment(loop, stage, state)
    intake = Intake(loop.algorithm, state, stage.ranks, _largest(loop, assignment), stage.claim)
    asked = _collect(loop, stage, assignment, cohort, intake, watch)
    complete = len(intake.accepted) >= _needed(loop, stage)
    state = _stepped(loop.algorithm, state, intake) if complete else _skipped(state)
    watch.lap("aggregate")
    validation = validate_state(loop, stage, state) if stage.validates(state.round_num) else None
    scores = evaluate_state(loop, stage, state) if stage.ends(state.round_num) else None
    watch.lap("evaluate")
    record = {
        "stage": stage.name,
        "round": state.round_num,
        "clients": cohort,
        "learning_rate": assignment.learning_rate,
        "skipped": not complete,
        **intake.record(),
        "score": scores["score"] if scores else None,
        "scores": scores,
        "validation": validation,
        "bytes_down": _bytes_down(loop.algorithm, stage, before, assignment.broadcast, asked),
    }
    record["seconds"] = watch.reset()
    # The line first, then the state: a line whose state is missing is rewound, a state whose line is missing would stay a gap.
    loop.store.append(record)
    checkpoint.save(state)
    watch.lap("checkpoint")
    loop.on_round(record | {"num_rounds": stage.num_rounds})
    return state


def _assignment(loop: Loop, stage: Stage, state: ServerState) -> Assignment:
    """What the clients of a round are told."""
    learning_rate = round_learning_rate(loop.training, state.round_num, stage.num_rounds)
    return Assignment(
        loop.algorithm.broadcast(state),
        loop.algorithm,
        learning_rate,
        loop.seed,
        loop.store.client_states(stage.name),
        stage.ranks,
        loop.compression,
        loop.failures.deadline,
        state.accepted,
    )


def _needed(loop: Loop, stage: Stage) -> int:
    """Updates that make a round of the stage complete."""
    return loop.failures.needed(loop.algorithm.smallest_cohort, stage.clients_per_round)


def _largest(loop: Loop, assignment: Assignment) -> Callable[[str, int], float] | None:
    """The largest norm that is taken, of an update or of what the method sends besides.

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


def _collect(loop: Loop, stage: Stage, assignment: Assignment, cohort: Sequence[str], intake: Intake, watch: _Watch) -> list[str]:
    """Ask the cohort, if need be again; the clients that were sent the task, one as often as it was.

    Raises:
        FederationError: if too few updates can be used, and the run is to stop then.
    """
    policy, needed = loop.failures, _needed(loop, stage)
    asked: list[str] = []
    for attempt in range(1, (policy.attempts if policy.below == "wait" else 1) + 1):
        missing = [name for name in cohort if name not in intake.accepted]
        if attempt > 1:
            loop.on_wait({"stage": stage.name, "round": assignment.broadcast.round_num + 1, "attempt": attempt, "clients": missing})
            time.sleep(policy.pause)
        answers = loop.engine.map_clients(assignment, {name: stage.clients[name] for name in missing})
        _take_in(_told(_reached(answers, asked), missing, loop, stage.name, assignment.broadcast.round_num + 1), intake, watch)
        if len(intake.accepted) >= needed:
            return asked
    if policy.below == "skip":
        return asked
    raise FederationError(intake.missing(stage.name, needed))


def _reached(answers: Iterable[Answer], asked: list[str]) -> Iterator[Answer]:
    """The answers; those of clients that were sent the task are noted as they come."""
    for answer in answers:
        if not isinstance(answer, ClientFailure) or answer.reached:
            asked.append(answer.client)
        yield answer


def _stepped(algorithm: Algorithm, state: ServerState, intake: Intake) -> ServerState:
    """The state after a round, which says whose updates are in it: these clients keep what they kept of it."""
    accepted = {client: [*state.accepted.get(client, ()), state.round_num][-2:] for client in intake.accepted}
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


def personal_models(loop: Loop, stage: Stage, state: ServerState) -> dict[str, Weights]:
    """The weights each client ends with, by client: the global ones, unless the method gives it its own from what it keeps. None where those are
    elsewhere."""
    if loop.algorithm.personalized and loop.scores is not None:
        return {}
    if not loop.algorithm.personalized:
        return dict.fromkeys(sorted(stage.clients), state.weights)
    states = loop.store.client_states(stage.name)
    kept = {client: states.load(client, state.accepted.get(client, ())) for client in sorted(stage.clients)}
    return {client: loop.algorithm.personal(state, slots) for client, slots in kept.items()}


def evaluate_state(loop: Loop, stage: Stage, state: ServerState) -> Metrics:
    """The scores of the global model; of a personalized method, those of the clients' own models, averaged.

    The standard error of an average over several clients is that over the clients.
    """
    if not loop.algorithm.personalized:
        return loop.evaluate(state.weights, state.base)
    if loop.scores is not None:
        rows = list(loop.scores(_assignment(loop, stage, state), sorted(stage.clients)).values())
    else:
        rows = [loop.evaluate(weights, state.base) for weights in personal_models(loop, stage, state).values()]
    error = error_over_models([row["score"] for row in rows])
    return over_models(rows) | ({} if error is None else {"standard_error": error})


def validate_state(loop: Loop, stage: Stage, state: ServerState) -> Metrics | None:
    """The same on the validation part; None where there is none."""
    if loop.validate is None:
        return None
    return evaluate_state(replace(loop, evaluate=loop.validate, scores=loop.validations), stage, state)


class _Watch:
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


def _told(answers: Iterable[Answer], asked: Sequence[str], loop: Loop, stage: str, round_num: int) -> Iterator[Answer]:
    """The same, with a word at each about who is still waited for."""
    waiting = dict.fromkeys(asked)
    loop.on_answer({"stage": stage, "round": round_num, "clients": list(waiting)})
    for answer in answers:
        waiting.pop(answer.client, None)
        loop.on_answer({"stage": stage, "round": round_num, "clients": list(waiting)})
        yield answer


def _take_in(updates: Iterable[Answer], intake: Intake, watch: _Watch) -> None:
    """Aggregate updates as they come, refusing those that would spoil the aggregate."""
    for update in updates:
        watch.lap("train")
        intake.take(update)
        watch.lap("aggregate")
