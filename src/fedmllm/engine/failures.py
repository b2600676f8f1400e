"""What to do about clients that fail, the same for every engine."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class FailureConfig(BaseModel):
    """What to do about clients that raise, die, are late or send what cannot be used.

    They are named in metrics and report; the average is over the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    deadline: float | None = Field(None, gt=0)
    """Seconds within which a round's updates must be there; null for no limit. In one process a client that has begun is let finish."""
    min_updates: int = Field(1, gt=0)
    """Updates without which a round is not complete. A method may need more (Krum)."""
    below: Literal["stop", "wait", "skip"] = "stop"
    """If there are fewer: ``stop`` with an error, to go on with --resume; ``wait``, asking those again whose updates are missing; or
    ``skip`` the round, which leaves the weights as they are."""
    attempts: int = Field(5, gt=1)
    """How often a client is asked at most, if ``below`` is ``wait``; then the run stops."""
    pause: float = Field(10.0, ge=0)
    """Seconds before clients are asked again; what died may need them to come back."""
    norm_limit: float | None = Field(10.0, ge=1)
    """An update is refused whose norm is more than so many times what training could give (``training.settings.reach``), or with controls (SCAFFOLD)
    that are more than this in each entry, as a root mean square; null to take any. What a client could reach that withholds how many samples it
    has is not known: its updates are not measured."""

    def needed(self, smallest_cohort: int, cohort: int) -> int:
        """Updates that make a round complete, of a method that needs so many, in rounds of so many clients; baselines are federations of one."""
        return min(max(self.min_updates, smallest_cohort), cohort)


NONE_EXPECTED = FailureConfig()
"""The defaults."""
