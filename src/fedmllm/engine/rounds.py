"""The one round loop: sample a cohort, broadcast, train, check and aggregate, evaluate, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict

from fedmllm import weights as W
from fedmllm.algorithms import Algorithm, ServerState
from fedmllm.engine.checkpoint import RunStore
from fedmllm.engine.in_process import Assignment
from fedmllm.errors import FederationError, listing
from fedmllm.models.lora import describe_mismatch
from fedmllm.randomness import generator
from fedmllm.training.local import TrainingConfig, round_learning_rate
from fedmllm.types import ClientUpdate, Metrics, Record, Sample, Weights


class EngineConfig(BaseModel):
    """Where clients run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["in_process"] = "in_process"
    """``in_process``: all clients in this process."""
    device: str = "auto"
    """``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, ..."""


class Engine(Protocol):
    """Runs the client rule over a cohort."""

    def map_clients(self, assignment: Assignment, clients: Mapping[str, Sequence[Sample]]) -> Iterator[ClientUpdate]:
        """One update per client, in the clients' order."""
        ...


@dataclass(frozen=True)
class Stage:
    """A federation to train. Centralized and local training are federations of one.

    Attributes:
        name: names its checkpoint and its lines of metrics.
        clients: samples by client.
        num_rounds: rounds to train.
        clients_per_round: size of a cohort.
        evaluate_every: rounds between evaluations, 0 for the last only.
    """

    name: str
    clients: Mapping[str, Sequence[Sample]]
    num_rounds: int
    clients_per_round: int
    evaluate_every: int = 0

    def cohort(self, seed: int, round_num: int) -> list[str]:
        """The clients of a round, drawn without replacement, sorted."""
        names = sorted(self.clients)
        chosen = generator(seed, "cohort", round_num).choice(len(names), size=self.clients_per_round, replace=False)
        return [names[i] for i in sorted(chosen)]

    def evaluates(self, round_num: int) -> bool:
        """Whether the global model is evaluated after this round (counted from 1)."""
        return round_num == self.num_rounds or (self.evaluate_every > 0 and round_num % self.evaluate_every == 0)


@dataclass(frozen=True)
class Loop:
    """What the loop works with, the same for all stages of a run.

    Attributes:
        algorithm: the method.
        engine: runs the clients.
        training: for the schedule of the learning rate.
        evaluate: scores given weights.
        store: where rounds are kept.
        seed: the experiment's.
        on_round: told each round's record.
    """

    algorithm: Algorithm
    engine: Engine
    training: TrainingConfig
    evaluate: Callable[[Weights], Metrics]
    store: RunStore
    seed: int
    on_round: Callable[[Record], None] = field(default=lambda record: None)


def run_stage(loop: Loop, stage: Stage, initial: Weights) -> ServerState:
    """Train a stage to its last round, from its checkpoint if it has one.

    Raises:
        FederationError: if in some round no client's update can be used.
    """
    state = loop.store.load_state(stage.name) or loop.algorithm.init(initial)
    loop.store.rewind(stage.name, state.round_num)
    watch = _Watch()
    while state.round_num < stage.num_rounds:
        state = _round(loop, stage, state, watch)
    return state


def _round(loop: Loop, stage: Stage, state: ServerState, watch: _Watch) -> ServerState:
    """One round, from the cohort to the checkpoint."""
    cohort = stage.cohort(loop.seed, state.round_num)
    broadcast = loop.algorithm.broadcast(state)
    learning_rate = round_learning_rate(loop.training, state.round_num, stage.num_rounds)
    assignment = Assignment(broadcast, loop.algorithm.local_rule(broadcast), learning_rate, loop.seed)
    updates = loop.engine.map_clients(assignment, {name: stage.clients[name] for name in cohort})
    intake = _take_in(updates, state.weights, loop.algorithm.weight, watch)
    state = loop.algorithm.server_step(state, intake.aggregate(stage.name, state.round_num))
    watch.lap("aggregate")
    scores = loop.evaluate(state.weights) if stage.evaluates(state.round_num) else None
    watch.lap("evaluate")
    record = {
        "stage": stage.name,
        "round": state.round_num,
        "clients": cohort,
        "learning_rate": learning_rate,
        **intake.record(),
        "score": scores["score"] if scores else None,
        "scores": scores,
        "bytes_down": len(cohort) * (W.num_bytes(broadcast.weights) + W.num_bytes(broadcast.extras)),
    }
    record["seconds"] = watch.reset()
    # The line first, then the state: a line whose state is missing is rewound, a state whose line is missing would stay a gap.
    loop.store.append(record)
    loop.store.save_state(stage.name, state)
    watch.lap("checkpoint")
    loop.on_round(record | {"num_rounds": stage.num_rounds})
    return state


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


@dataclass
class _Intake:
    """Updates taken in so far: their running mean, and what is told about them."""

    mean: W.WeightedMean
    num_samples: int = 0
    bytes_up: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    refused: list[Record] = field(default_factory=list)

    def take(self, update: ClientUpdate, expected: Weights, weight: Callable[[int], float]) -> None:
        """Add an update to the mean with its weight by number of samples, or refuse it."""
        self.bytes_up += W.num_bytes(update.update)
        if reason := refusal(update, expected):
            self.refused.append({"client": update.client, "reason": reason})
            return
        self.mean.add(update.update, weight(update.num_samples))
        self.num_samples += update.num_samples
        if "loss" in update.metrics:
            self.losses.append((update.num_samples, update.metrics["loss"]))

    def aggregate(self, stage: str, round_num: int) -> Weights:
        """The mean of the updates."""
        if self.num_samples == 0:
            reasons = listing(f"{row['client']}: {row['reason']}" for row in self.refused)
            raise FederationError(
                f"stage {stage}, round {round_num + 1}: no update can be used:\n{reasons}\ntry a lower training.learning_rate"
            )
        return self.mean.value()

    def record(self) -> Record:
        """The round's numbers about its clients; the loss is None where none of them took a step."""
        weight = sum(count for count, _ in self.losses)
        loss = sum(count * loss for count, loss in self.losses) / weight if weight else None
        return {"num_samples": self.num_samples, "loss": loss, "bytes_up": self.bytes_up, "refused": self.refused}


def _take_in(updates: Iterable[ClientUpdate], expected: Weights, weight: Callable[[int], float], watch: _Watch) -> _Intake:
    """Aggregate updates as they come, refusing those that would spoil the average."""
    intake = _Intake(W.WeightedMean())
    for update in updates:
        watch.lap("train")
        intake.take(update, expected, weight)
        watch.lap("aggregate")
    return intake


def refusal(update: ClientUpdate, expected: Weights) -> str | None:
    """Why an update cannot be used: wrong names or shapes, NaN or infinity, no samples. None if it can."""
    if mismatch := describe_mismatch(update.update, expected):
        return mismatch
    if not W.is_finite(update.update):
        return "the update holds NaN or infinity"
    if update.num_samples <= 0:
        return f"num_samples is {update.num_samples}"
    return None
