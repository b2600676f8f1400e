"""Federated Learning with Buffered Asynchronous Aggregation. Nguyen et al., AISTATS 2022 (FedBuff)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedmllm.algorithms import Algorithm, Outstanding, ServerState
from fedmllm.engine.stages import Stage, drawn
from fedmllm.errors import ConfigError
from fedmllm.types import Weights

if TYPE_CHECKING:
    from fedmllm.engine.rounds import Loop, Round


@dataclass(frozen=True)
class Buffered:
    """The server steps whenever ``buffer`` updates have come, while other clients go on training from older weights.

        w <- method's step with  D_k (1 + tau_k)^(-staleness),   tau_k = steps of the server since client k was sent its weights

    A step is a round. ``concurrency`` clients are at work or wait in the buffer; after a step as many new ones as it took are sent the new weights.
    (The paper replaces a client as soon as it answers; here its place is free once its update is used, so that a buffer as large as the concurrency
    is the synchronous schedule.) The factor shrinks an update, and is not divided out: a buffer of stale updates moves the weights less.

    Simulated clients answer in simulated time, in which training takes as long as a client has samples; the first to be done is the next to be
    taken. The end is the same whatever the machine. Remote clients answer when they do. A client that fails is replaced, up to ``concurrency``
    times a round. Each simulated client trains by itself, not side by side with others.

    Attributes:
        concurrency: clients at work or in the buffer; 0 for ``federation.clients_per_round``.
        buffer: updates the server steps on; 0 for as many as ``concurrency``.
        staleness: the exponent; 0 takes stale updates in full.
    """

    concurrency: int = 0
    buffer: int = 0
    staleness: float = 0.5

    def __post_init__(self) -> None:
        for name in ("concurrency", "buffer", "staleness"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    def require(self, algorithm: Algorithm, method: str, num_clients: int, cohort: int) -> None:
        """Updates must mean the same whatever weights they began from, and numbers must fit each other."""
        concurrency = self.concurrency or cohort
        buffer = self.buffer or concurrency
        if not algorithm.takes_stale_updates:
            raise ConfigError(f"schedule.name: {method} cannot mix updates that began from different weights; use synchronous")
        if concurrency > num_clients:
            raise ConfigError(
                f"schedule.parameters: concurrency {concurrency} is more than federation.num_clients, {num_clients}; lower it"
            )
        if buffer > concurrency:
            raise ConfigError(f"schedule.parameters: a buffer of {buffer} never fills with {concurrency} clients at work; lower it")
        if buffer < algorithm.smallest_cohort:
            raise ConfigError(f"schedule.parameters: {method} needs {algorithm.smallest_cohort} updates or more, buffer is {buffer}")

    def updates(self, stage: Stage) -> int:
        """The buffer."""
        return self.buffer or self.concurrency_of(stage)

    def concurrency_of(self, stage: Stage) -> int:
        """As set."""
        return self.concurrency or stage.clients_per_round

    def resume(self, loop: Loop, stage: Stage, state: ServerState) -> None:
        """Send those at work what they were sent."""
        for client, (round_num, _) in state.outstanding.clients.items():
            loop.engine.submit(loop.assignment(stage, _earlier(state, round_num)), {client: stage.clients[client]})

    def collect(self, this: Round) -> Outstanding:
        """Fill the places that are free, then take answers until the buffer is full."""
        work, policy = _AtWork(this, self), this.loop.failures
        for attempt in range(1, (policy.attempts if policy.below == "wait" else 1) + 1):
            if attempt > 1:
                this.again(attempt, sorted(work.failed))
            work.fill(attempt)
            if this.complete:
                return work.left()
        this.too_few()
        return work.left()


class _AtWork:
    """Clients that train while the server goes on, during a round."""

    def __init__(self, this: Round, schedule: Buffered) -> None:
        self._this, self._schedule = this, schedule
        before = this.state.outstanding
        self._clients, self._weights, self._clock = dict(before.clients), dict(before.weights), before.clock
        self._weights[this.state.round_num] = this.state.weights
        self.failed: set[str] = set()
        """Whose answers could not be used, of this attempt."""

    def fill(self, attempt: int) -> None:
        """Take answers until the buffer is full, or nobody is left to ask."""
        this, concurrency = self._this, self._schedule.concurrency_of(self._this.stage)
        self.failed.clear()
        self._ask(concurrency - len(self._clients), *([attempt] if attempt > 1 else []))
        this.tell(list(self._clients))
        while len(this.intake.accepted) < self._schedule.updates(this.stage) and self._clients:
            self._take()
            if self.failed and len(self.failed) <= concurrency and len(self._clients) + len(this.intake.accepted) < concurrency:
                self._ask(1, attempt, len(self.failed))
            this.tell(list(self._clients))

    def _ask(self, count: int, *again: int) -> None:
        """Send some of the clients that are free the newest weights."""
        this = self._this
        taken = {*self._clients, *this.intake.accepted, *self.failed}
        free = [name for name in sorted(this.stage.clients) if name not in taken]
        for name in drawn(free, min(count, len(free)), this.loop.seed, this.state.round_num, *again):
            samples = this.stage.clients[name]
            this.loop.engine.submit(this.assignment, {name: samples})
            self._clients[name] = (this.state.round_num, self._clock + len(samples))

    def _take(self) -> None:
        """The next answer: of whoever is done first."""
        this, engine = self._this, self._this.loop.engine
        # Of several the one that was asked first.
        order = None if engine.remote else [min(self._clients, key=lambda name: self._clients[name][1])]
        answer = next(engine.completed(order))
        round_num, done = self._clients.pop(answer.client)
        self._clock = max(self._clock, done)
        stale = this.state.round_num - round_num
        this.take(answer, _earlier(this.state, round_num, self._weights), (1 + stale) ** -self._schedule.staleness)
        if answer.client in this.intake.accepted:
            this.facts.setdefault("staleness", {})[answer.client] = stale
        else:
            self.failed.add(answer.client)

    def left(self) -> Outstanding:
        """Who is still at work, from which weights."""
        rounds = {round_num for round_num, _ in self._clients.values()}
        return Outstanding(self._clients, {n: weights for n, weights in self._weights.items() if n in rounds}, self._clock)


def _earlier(state: ServerState, round_num: int, weights: Mapping[int, Weights] | None = None) -> ServerState:
    """The state that clients were sent in an earlier round, as far as they see it."""
    if round_num == state.round_num:
        return state
    return replace(state, round_num=round_num, weights=(weights or state.outstanding.weights)[round_num])
