"""Whom a run tells about its progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedmllm.algorithms import Remark
from fedmllm.engine.stages import Stage
from fedmllm.types import Record

START = "start"
"""Stands for the stage before the first round, in which sites are asked whether they are there."""


@dataclass(frozen=True)
class Observer:
    """Whom a run tells about its progress.

    Attributes:
        started: told the stages to come, before the first.
        round_done: told each round's record, as in ``metrics.jsonl``, with the stage's ``num_rounds``.
        waiting: told ``stage``, ``round``, ``attempt`` and ``clients`` when clients are asked again; before the first round ``stage``, which is
            ``start``, and ``clients`` when sites are waited for, with ``given_up`` when the run begins without them.
        answered: told ``stage``, ``round`` (but at the start) and ``clients``, those whose answers are still to come, in the order in which they are
            taken, when clients are asked and at each answer.
        remarked: told, before the first round, what a strategy does otherwise than its description has it, by strategy.
        opened: told the run folder, once it is made.
        encoded: told how many samples, of how many, have been made into what the model takes, before the first round.
        resumed: told, before the first round, the bytes that were sent before the run was interrupted; 0 for a new run.
    """

    started: Callable[[Sequence[Stage]], None] = lambda stages: None
    round_done: Callable[[Record], None] = lambda record: None
    waiting: Callable[[Record], None] = lambda record: None
    answered: Callable[[Record], None] = lambda record: None
    remarked: Callable[[Mapping[str, Remark]], None] = lambda remarks: None
    opened: Callable[[Path], None] = lambda folder: None
    resumed: Callable[[int], None] = lambda sent: None
    encoded: Callable[[int, int], None] = lambda done, total: None

    def beside(self, tell: Callable[[Record], None]) -> Observer:
        """The same, and another that is told each round's record."""

        def both(record: Record) -> None:
            self.round_done(record)
            tell(record)

        return replace(self, round_done=both)


UNOBSERVED = Observer()
"""Nobody."""
