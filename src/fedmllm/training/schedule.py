"""How the learning rate goes: over the rounds, and over the steps of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

_WORDS = {"cosine": "rounds", "constant": "none"}
"""Short forms of a schedule without warmup, by what the cosine goes over."""


class ScheduleConfig(BaseModel):
    """How the learning rate goes: ``cosine`` over the rounds, ``constant``, or a mapping of these keys. The rate of a step is the round's, times
    the step's factor."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    over: Literal["rounds", "steps", "both", "none"] = "rounds"
    """What the cosine goes over; ``both``, with a warmup of 0.01, is the FedMLLM paper's. One-shot methods have one round: ``steps``."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of a round's steps in which the rate rises to the round's in equal parts; needs ``over: steps`` or ``both``."""

    @model_validator(mode="before")
    @classmethod
    def _in_a_word(cls, value: Any) -> Any:
        if isinstance(value, (Mapping, ScheduleConfig)):
            return value
        if not isinstance(value, str) or value not in _WORDS:
            raise ValueError(f"must be {' or '.join(_WORDS)}, or a mapping such as {{over: steps, warmup: 0.01}}, is {value!r}")
        return {"over": _WORDS[value]}

    @model_validator(mode="after")
    def _steps_to_warm_up(self) -> ScheduleConfig:
        if self.warmup and not self.falls_over_steps:
            raise ValueError(
                f"warmup: {self.warmup:g} is of a round's steps, but over is {self.over}; set over to steps or both, or warmup to 0"
            )
        return self

    @model_serializer
    def _written(self) -> str | dict[str, Any]:
        """As a word where there is one: settings written before there was more stay as they are."""
        words = {over: word for word, over in _WORDS.items()}
        return words.get(self.over, {"over": self.over, "warmup": self.warmup})

    @property
    def falls_over_steps(self) -> bool:
        """Whether the rate changes within a round."""
        return self.over in ("steps", "both")


def of_round(schedule: ScheduleConfig, round_num: int, num_rounds: int) -> float:
    """The round's factor of the rate: ``(1 + cos(pi round_num / num_rounds)) / 2``, or 1 where the cosine is over steps, or there is none.

    Args:
        schedule: of the training.
        round_num: counted from 0.
        num_rounds: of the stage.
    """
    if schedule.over in ("steps", "none"):
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * round_num / num_rounds))


def of_step(schedule: ScheduleConfig, step: int, num_steps: int) -> float:
    """The step's factor of its round's rate. With ``m = ceil(warmup num_steps)``

        (step + 1) / m                                           for the first m steps,
        (1 + cos(pi (step - m) / (num_steps - m))) / 2           after,

    so that no step has a rate of zero; 1 where the cosine is over rounds alone.

    Args:
        schedule: of the training.
        step: counted from 0, over all epochs of the round.
        num_steps: of the client in this round.
    """
    if not schedule.falls_over_steps:
        return 1.0
    rising = math.ceil(schedule.warmup * num_steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (num_steps - rising)))
