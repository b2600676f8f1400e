"""Callbacks that report a run's progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedmllm.algorithms import Remark, ServerState
from fedmllm.engine.stages import Stage
from fedmllm.types import Record

START = "start"
"""Stage name before the first round, while the run waits for sites to report."""


@dataclass(frozen=True)
class Observer:
    """Callbacks that report a run's progress. The default callbacks do nothing.

    Attributes:
        started: called once before the first stage with all stages.
        round_done: called after each round with its record, as in ``metrics.jsonl``, plus the stage's ``num_rounds``.
        waiting: called when clients are retried, with ``stage``, ``round``, ``attempt`` and ``clients``. Before the first round it is called when the
            run waits for sites, with ``stage`` (``start``) and ``clients``, and with ``given_up`` if the run starts without them.
        answered: called when clients receive a task and after each answer, with ``stage``, ``round`` (absent at the start) and ``clients``: the
            outstanding clients, in the order in which the run takes their answers.
        remarked: called before the first round with how a strategy deviates from its description, by strategy.
        opened: called with the run folder once it exists.
        stepped: called with a stage's name, its number of rounds and the server state, before the first round and after each round.
        encoded: called before the first round with the number of encoded samples and the total.
        resumed: called before the first round with the bytes that were sent before the run was interrupted; 0 for a new run.
    """

    started: Callable[[Sequence[Stage]], None] = lambda stages: None
    round_done: Callable[[Record], None] = lambda record: None
    waiting: Callable[[Record], None] = lambda record: None
    answered: Callable[[Record], None] = lambda record: None
    remarked: Callable[[Mapping[str, Remark]], None] = lambda remarks: None
    opened: Callable[[Path], None] = lambda folder: None
    resumed: Callable[[int], None] = lambda sent: None
    stepped: Callable[[str, int, ServerState], None] = lambda stage, num_rounds, state: None
    encoded: Callable[[int, int], None] = lambda done, total: None

    def beside(self, report: Callable[[Record], None]) -> Observer:
        """Return a copy that also passes each round's record to ``report``."""

        def both(record: Record) -> None:
            self.round_done(record)
            report(record)

        return replace(self, round_done=both)


UNOBSERVED = Observer()
"""An observer that ignores everything."""
