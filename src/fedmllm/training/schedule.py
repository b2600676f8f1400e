"""The learning-rate schedule over rounds and over the steps of a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

_WORDS = {"cosine": "rounds", "constant": "none"}
"""Short forms of schedules without warmup, and the ``over`` that each stands for."""


class ScheduleConfig(BaseModel):
    """The learning-rate schedule: ``cosine`` (over the rounds), ``constant``, or a mapping of these keys. A step's learning rate is
    ``learning_rate`` times the round's factor times the step's factor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    over: Literal["rounds", "steps", "both", "none"] = "rounds"
    """What the cosine decays over: the rounds, the steps of each round, both, or nothing. Use ``steps`` for one-shot methods, which have
    a single round. The FedMLLM paper uses ``both`` with a warmup of 0.01."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of a round's steps in which the learning rate rises linearly to the round's rate. Requires ``over: steps`` or ``both``."""

    @model_validator(mode="before")
    @classmethod
    def _in_a_word(cls, value: Any) -> Any:
        if isinstance(value, (Mapping, ScheduleConfig)):
            return value
        if not isinstance(value, str) or value not in _WORDS:
            raise ValueError(f"must be {' or '.join(_WORDS)}, or a mapping such as {{over: steps, warmup: 0.01}}, got {value!r}")
        return {"over": _WORDS[value]}

    @model_validator(mode="after")
    def _steps_to_warm_up(self) -> ScheduleConfig:
        if self.warmup and not self.falls_over_steps:
            raise ValueError(
                f"warmup: {self.warmup:g} is a share of a round's steps, but over is {self.over}; set over to steps or both, or warmup to 0"
            )
        return self

    @model_serializer
    def _written(self) -> str | dict[str, Any]:
        """Write the short form if there is one, so that files written when only short forms existed do not change."""
        words = {over: word for word, over in _WORDS.items()}
        return words.get(self.over, {"over": self.over, "warmup": self.warmup})

    @property
    def falls_over_steps(self) -> bool:
        """Whether the rate changes within a round."""
        return self.over in ("steps", "both")


def of_round(schedule: ScheduleConfig, round_num: int, num_rounds: int) -> float:
    """Return the round's factor of the learning rate: ``(1 + cos(pi round_num / num_rounds)) / 2``, or 1 if ``over`` is steps or none.

    Args:
        schedule: the schedule.
        round_num: the round, counted from 0.
        num_rounds: number of rounds in the stage.
    """
    if schedule.over in ("steps", "none"):
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * round_num / num_rounds))


def of_step(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """Return the step's factor of the round's learning rate. With ``m = ceil(warmup num_steps)`` it is

        (step + 1) / m                                           for the first m steps,
        (1 + cos(pi (step - m) / (num_steps - m))) / 2           afterward,

    so that no step has a rate of zero. It is 1 if ``over`` is rounds or none.

    Args:
        schedule: the schedule.
        step: the step, counted from 0 over all epochs of the round.
        num_steps: the client's number of steps in this round.
    """
    if not schedule.falls_over_steps:
        return 1.0
    rising = math.ceil(schedule.warmup * num_steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (num_steps - rising)))
