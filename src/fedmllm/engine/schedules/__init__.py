"""The index of schedules: who is asked when, and when the server steps. One file each, found by the name in ``schedule.name``."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmllm.engine.schedules.base import Schedule
from fedmllm.engine.schedules.buffered import Buffered
from fedmllm.engine.schedules.synchronous import Synchronous
from fedmllm.registry import Value, built, index

__all__ = ["SCHEDULES", "SYNCHRONOUS", "Schedule", "SchedulingConfig", "build_schedule"]

SCHEDULES: dict[str, type[Any]] = index("schedule", {"buffered": Buffered, "synchronous": Synchronous})

SYNCHRONOUS: Schedule = Synchronous()
"""Rounds of a cohort each, the default."""


class SchedulingConfig(BaseModel):
    """Who is asked when, and when the server steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = "synchronous"
    """``synchronous``: a round waits for its cohort; ``buffered`` (FedBuff): the server steps whenever enough updates have come."""
    parameters: dict[str, Value] = Field(default_factory=dict)
    """The schedule's own settings by name; left out for its defaults."""

    @model_validator(mode="after")
    def _known(self) -> SchedulingConfig:
        build_schedule(self)
        return self


def build_schedule(config: SchedulingConfig) -> Schedule:
    """The schedule a configuration names.

    Raises:
        ConfigError: if there is no such schedule or parameter, or a value breaks a rule.
    """
    return cast(Schedule, built(SCHEDULES, "schedule", config.name, config.parameters))
