"""The round loop: submit tasks to clients, check and aggregate their updates, step the server, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fedmllm import weights as W
from fedmllm.algorithms import NONE_OUTSTANDING, Algorithm, Outstanding, ServerState, UpdateTransform
from fedmllm.engine.base import Assignment, Engine, Split
from fedmllm.engine.checkpoint import BackgroundCheckpoint, RunStore
from fedmllm.engine.failures import NONE_EXPECTED, FailureConfig
from fedmllm.engine.intake import Intake, Origin
from fedmllm.engine.observer import UNOBSERVED, Observer
from fedmllm.engine.round_records import round_record
from fedmllm.engine.schedules import SYNCHRONOUS, Schedule
from fedmllm.engine.scores import evaluate_state, validate_state
from fedmllm.engine.secure import FACTS, SecureAggregation, Session, facts
from fedmllm.engine.stages import Stage
from fedmllm.engine.watch import Watch
from fedmllm.errors import FederationError
from fedmllm.privacy.client_level import ClientPrivacy
from fedmllm.training.settings import TrainingConfig, reach, round_learning_rate
from fedmllm.types import BASE_STEP, UPDATE, Answer, Population, Record


@dataclass(frozen=True)
class Loop:
    """The parts of the round loop that all stages of a run share.

    Attributes:
        algorithm: the method.
        engine: trains clients.
        training: training settings, which define the learning-rate schedule.
        test: the split on which the run scores the final model.
        store: holds checkpoints and metrics.
        seed: the experiment's seed.
        transforms: the experiment's update transforms, applied after the method's own.
        failures: the policy for clients that fail.
        observer: receives progress.
        validation: the split on which the run scores models during training; None for none.
        schedule: decides when clients receive tasks and when the server steps.
        privacy: the mechanism of client-level differential privacy; None for none.
        withholds: whether to hide private facts: clients learn only how many clients there are, and metrics omit the reasons of refusals.
        secure: how the updates of a round are summed without showing any single one; None if clients send them.
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
    privacy: ClientPrivacy | None = None
    withholds: bool = False
    secure: SecureAggregation | None = None

    def assignment(self, stage: Stage, state: ServerState) -> Assignment:
        """Return the task for clients that train from a server state."""
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
            self.secure.round_id(stage.name, state.round_num) if self.secure else None,
        )


class Round:
    """A round in progress, through which a schedule submits tasks and takes answers.

    Args:
        loop: what all stages share.
        stage: the federation to train.
        state: the server state at the start of the round.
        watch: measures the time by activity.
    """

    def __init__(self, loop: Loop, stage: Stage, state: ServerState, watch: Watch) -> None:
        self.loop, self.stage, self.state, self._watch = loop, stage, state, watch
        self.assignment = loop.assignment(stage, state)
        secure = loop.secure is not None
        self.intake = Intake(loop.algorithm, state, stage.ranks, self.assignment.chain, stage.claim, loop.privacy, secure)
        self.clients: list[str] = []
        """Clients whose answers the round took."""
        self.facts: Record = {}
        """Fields that the schedule adds to the round's record."""
        self._origins: dict[int, Origin] = {}

    @property
    def needed(self) -> int:
        """Number of accepted updates that complete the round. A secret cohort may be empty."""
        if self.loop.privacy and self.loop.privacy.secret_cohort:
            return 0
        least = max(self.loop.algorithm.smallest_cohort, self.loop.secure.min_clients if self.loop.secure else 0)
        return self.loop.failures.needed(least, self.loop.schedule.updates(self.stage.clients_per_round))

    @property
    def complete(self) -> bool:
        """Whether the round has accepted enough updates."""
        return len(self.intake.accepted) >= self.needed

    def collect(self) -> Outstanding:
        """Take the answers of clients and, with secure aggregation, the sum of the updates that they hold back.

        Returns:
            The clients that are still outstanding.

        Raises:
            FederationError: if there are too few usable updates and ``failures.below`` is not ``skip``.
        """
        secure, schedule = self.loop.secure, self.loop.schedule
        if secure is None:
            return schedule.collect(self)
        # A crash came after clients were asked to mask, and they mask once. Training them again would be in vain.
        if reason := secure.spent(secure.round_id(self.stage.name, self.state.round_num)):
            self.facts[FACTS] = facts(0, [], reason, {"bytes_up": 0, "bytes_down": 0})
            return NONE_OUTSTANDING
        left = schedule.collect(self)
        if self.complete:
            Session(self, secure).run()
            self._watch.lap("aggregate")
        return left

    def cohort(self) -> list[str]:
        """Return the clients to ask. Each call draws a new secret cohort."""
        privacy = self.loop.privacy
        if privacy and privacy.secret_cohort:
            return privacy.drawn(sorted(self.stage.clients))
        return self.stage.cohort(self.loop.seed, self.state.round_num)

    def tell(self, outstanding: Sequence[str]) -> None:
        """Report the outstanding clients to the observer, unless the cohort is secret."""
        if self.loop.privacy and self.loop.privacy.secret_cohort:
            return
        self.loop.observer.answered({"stage": self.stage.name, "round": self.state.round_num + 1, "clients": list(outstanding)})

    def take(self, answer: Answer, sent: ServerState | None = None, scale: float = 1.0) -> None:
        """Check an answer and add it to the round.

        Args:
            answer: the client's answer.
            sent: the server state that the client trained from; by default the state at the start of this round.
            scale: factor that multiplies the update.
        """
        self._watch.lap("train")
        self.intake.take(answer, replace(self._origin(sent or self.state), scale=scale))
        if answer.client not in self.clients:
            self.clients.append(answer.client)
        self._watch.lap("aggregate")

    def _origin(self, sent: ServerState) -> Origin:
        """Return the origin of answers to a state. Origins are cached by round because the norm limit needs a pass over all weights."""
        if sent.round_num not in self._origins:
            assignment = self.assignment if sent is self.state else self.loop.assignment(self.stage, sent)
            self._origins[sent.round_num] = Origin(sent, largest_norm(self.loop, assignment))
        return self._origins[sent.round_num]

    def complete_by(self, ask: Callable[[int], None], missing: Callable[[], Sequence[str]]) -> None:
        """Ask clients until the round is complete, with the retries of ``failures``. If ``failures.below`` is ``skip``, the round may stay incomplete.

        Args:
            ask: submits tasks and takes answers, given the number of the attempt from 1.
            missing: returns the clients to name when a further attempt begins.

        Raises:
            FederationError: if the round has too few usable updates and must not be skipped.
        """
        policy = self.loop.failures
        for attempt in range(1, (policy.attempts if policy.below == "wait" else 1) + 1):
            if attempt > 1:
                record = {"stage": self.stage.name, "round": self.state.round_num + 1, "attempt": attempt, "clients": list(missing())}
                self.loop.observer.waiting(record)
                time.sleep(policy.pause)
            ask(attempt)
            if self.complete:
                return
        if policy.below != "skip":
            raise FederationError(self.intake.missing(self.stage.name, self.needed))


def run_stage(loop: Loop, stage: Stage, initial: ServerState) -> ServerState:
    """Train a stage to its last round, starting from its checkpoint if there is one.

    Args:
        loop: what all stages share.
        stage: the federation to train.
        initial: the server state before the first round.

    Returns:
        The server state after the last round.

    Raises:
        FederationError: if a round has too few usable updates and ``failures.below`` is not ``skip``.
    """
    state = replace(loop.store.load_state(stage.name) or initial, population=_population(loop, stage))
    loop.store.rewind(stage.name, state.round_num)
    watch = Watch()
    loop.schedule.resume(loop, stage, state)
    try:
        # A private round must not be trained twice, so its checkpoint is on the disk before the next task is sent.
        # Neither must a round of secure aggregation, which would be skipped.
        durable = loop.privacy is not None or loop.secure is not None
        with BackgroundCheckpoint(loop.store, stage.name, durable) as checkpoint:
            loop.observer.stepped(stage.name, stage.num_rounds, state)
            while state.round_num < stage.num_rounds:
                state = _round(Round(loop, stage, state, watch), watch, checkpoint)
                loop.observer.stepped(stage.name, stage.num_rounds, state)
    finally:
        loop.engine.cancel()
    return state


def _population(loop: Loop, stage: Stage) -> Population:
    """Return what the server and its clients may know about all clients: with privacy, only their number."""
    if loop.privacy or loop.withholds:
        return Population(len(stage.clients))
    return stage.population if loop.algorithm.needs_labels else replace(stage.population, labels={})


def _round(this: Round, watch: Watch, checkpoint: BackgroundCheckpoint) -> ServerState:
    """Run one round, from the first task to the checkpoint."""
    loop, stage, before = this.loop, this.stage, this.state
    left = this.collect()
    state = _stepped(this) if this.complete else _skipped(loop, before)
    state = replace(state, outstanding=left)
    watch.lap("aggregate")
    validation = validate_state(loop, stage, state) if stage.validates(state.round_num) else None
    scores = evaluate_state(loop, stage, state) if stage.ends(state.round_num) else None
    watch.lap("evaluate")
    record = round_record(this, state, validation, scores, watch.reset())
    # Write the metrics line before the state. A resumed run removes a line without a state, but could not restore a missing line.
    loop.store.append(record)
    checkpoint.save(state)
    watch.lap("checkpoint")
    loop.observer.round_done(record | {"num_rounds": stage.num_rounds})
    return state


def largest_norm(loop: Loop, assignment: Assignment) -> Callable[[str, int], float] | None:
    """Return a function that gives the largest accepted norm of an update or of a method's extra tensors; None for no limit.

    The limit of an update includes the norm of the received weights, because a method may set some of them to zero. Extra tensors are gradients, to
    which that limit does not apply. Gradients of a mean negative log-likelihood are far below one in each entry.
    """
    factor, weights = loop.failures.norm_limit, assignment.broadcast.weights
    if factor is None or loop.privacy:  # Privacy clips every update; a refusal would reveal the norm.
        return None
    size, entries = W.norm(weights), sum(tensor.numel() for tensor in weights.values())

    def largest(kind: str, count: int) -> float:
        return factor * (math.sqrt(entries) if kind != UPDATE else reach(loop.training, assignment.learning_rate, count, entries) + size)

    return largest


def _stepped(this: Round) -> ServerState:
    """Return the state after a round. Its ``accepted`` names the clients whose updates are in it, so that they commit what they kept."""
    loop, before, intake = this.loop, this.state, this.intake
    if loop.privacy and not loop.secure:
        loop.privacy.spend(this.stage.name, before.round_num + 1, list(intake.accepted))
    aggregate = intake.aggregate()
    state = loop.algorithm.server_step(before, aggregate)
    if loop.privacy:
        state = replace(state, slots={**state.slots, **loop.privacy.slots_after(aggregate.mean, before.slots)})
        if loop.privacy.secret_cohort:
            return state
    accepted = {client: [*before.accepted.get(client, ()), trained_from][-2:] for client, trained_from in intake.accepted.items()}
    return replace(state, accepted=dict(sorted({**before.accepted, **accepted}.items())))


def _skipped(loop: Loop, state: ServerState) -> ServerState:
    """Return the same state one round later. No update counts, and no change to the frozen weights is sent."""
    if loop.privacy:
        loop.privacy.skip()
    return replace(state, round_num=state.round_num + 1, slots={kind: slot for kind, slot in state.slots.items() if kind != BASE_STEP})
