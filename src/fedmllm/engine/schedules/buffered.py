"""Federated Learning with Buffered Asynchronous Aggregation. Nguyen et al., AISTATS 2022 (FedBuff)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedmllm.algorithms import Algorithm, Outstanding, ServerState
from fedmllm.algorithms.checks import require_not_negative
from fedmllm.engine.stages import Stage, drawn
from fedmllm.errors import ConfigError
from fedmllm.types import Weights

if TYPE_CHECKING:
    from fedmllm.engine.rounds import Loop, Round


@dataclass(frozen=True)
class Buffered:
    """The server steps whenever it has ``buffer`` updates, while other clients continue to train from older weights.

        w <- the method's step with  D_k (1 + tau_k)^(-staleness),   tau_k = server steps since client k received its weights

    A step is a round. At any time ``concurrency`` clients train or have an update in the buffer. After a step, as many new clients as there were
    updates receive the new weights. (The paper replaces a client as soon as it answers. Here a client's place becomes free when the server uses its
    update, so that a buffer as large as the concurrency equals the synchronous schedule.) The staleness factor scales the update but not its weight
    in the average, so a buffer of stale updates moves the weights less.

    Simulated clients answer in simulated time: training takes time proportional to a client's number of samples, and the client that finishes first
    answers first. Results therefore do not depend on the machine's speed. Remote clients answer in real time. A client that fails is replaced, up
    to ``concurrency`` times a round. Simulated clients train one after another, not in parallel.

    Attributes:
        concurrency: clients that train or have an update in the buffer; 0 for ``federation.clients_per_round``.
        buffer: updates per server step; 0 for the same number as ``concurrency``.
        staleness: exponent of the staleness factor; 0 takes stale updates in full.
    """

    concurrency: int = 0
    buffer: int = 0
    staleness: float = 0.5

    def __post_init__(self) -> None:
        require_not_negative(concurrency=self.concurrency, buffer=self.buffer, staleness=self.staleness)

    def require(self, algorithm: Algorithm, method: str, num_clients: int, cohort: int) -> None:
        """Check that the method can mix updates from different weights, and that ``concurrency`` and ``buffer`` are possible."""
        concurrency, buffer = self.concurrent(cohort), self.updates(cohort)
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

    def updates(self, cohort: int) -> int:
        """Return the size of the buffer."""
        return self.buffer or self.concurrent(cohort)

    def concurrent(self, cohort: int) -> int:
        """Return the concurrency."""
        return self.concurrency or cohort

    def resume(self, loop: Loop, stage: Stage, state: ServerState) -> None:
        """Resubmit outstanding clients with the weights that they received before."""
        for client, (round_num, _) in state.outstanding.clients.items():
            loop.engine.submit(loop.assignment(stage, _earlier(state, round_num)), {client: stage.clients[client]})

    def collect(self, this: Round) -> Outstanding:
        """Submit tasks up to the concurrency, then take answers until the buffer is full."""
        work = _AtWork(this, self)
        this.complete_by(work.fill, lambda: sorted(work.failed))
        return work.left()


class _AtWork:
    """The outstanding clients during a round."""

    def __init__(self, this: Round, schedule: Buffered) -> None:
        self._this, self._schedule = this, schedule
        before = this.state.outstanding
        self._clients, self._weights, self._clock = dict(before.clients), dict(before.weights), before.clock
        self._weights[this.state.round_num] = this.state.weights
        self.failed: set[str] = set()
        """Clients whose answers could not be used in this attempt."""

    def fill(self, attempt: int) -> None:
        """Take answers until the buffer is full or no client is outstanding."""
        this, cohort = self._this, self._this.stage.clients_per_round
        concurrency, updates = self._schedule.concurrent(cohort), self._schedule.updates(cohort)
        self.failed.clear()
        self._ask(concurrency - len(self._clients), *([attempt] if attempt > 1 else []))
        this.tell(list(self._clients))
        while len(this.intake.accepted) < updates and self._clients:
            self._take()
            if self.failed and len(self.failed) <= concurrency and len(self._clients) + len(this.intake.accepted) < concurrency:
                self._ask(1, attempt, len(self.failed))
            this.tell(list(self._clients))

    def _ask(self, count: int, *again: int) -> None:
        """Submit tasks with the newest weights to randomly drawn idle clients."""
        this = self._this
        taken = {*self._clients, *this.intake.accepted, *self.failed}
        free = [name for name in sorted(this.stage.clients) if name not in taken]
        chosen = {
            name: this.stage.clients[name] for name in drawn(free, min(count, len(free)), this.loop.seed, this.state.round_num, *again)
        }
        if chosen:
            this.loop.engine.submit(this.assignment, chosen)
        self._clients |= {name: (this.state.round_num, self._clock + len(samples)) for name, samples in chosen.items()}

    def _take(self) -> None:
        """Take the next answer, from the client that finishes first."""
        this, engine = self._this, self._this.loop.engine
        # If several clients finish at the same time, take the one that received its task first.
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
        """Return the clients that are still outstanding, and the weights that they train from."""
        rounds = {round_num for round_num, _ in self._clients.values()}
        return Outstanding(self._clients, {n: weights for n, weights in self._weights.items() if n in rounds}, self._clock)


def _earlier(state: ServerState, round_num: int, weights: Mapping[int, Weights] | None = None) -> ServerState:
    """Return the state of an earlier round with the fields that clients receive."""
    if round_num == state.round_num:
        return state
    return replace(state, round_num=round_num, weights=(weights or state.outstanding.weights)[round_num])
