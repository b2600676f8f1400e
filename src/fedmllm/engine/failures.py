"""The policy for clients that fail, the same for every engine."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fedmllm.settings_file import ADVANCED


class FailureConfig(BaseModel):
    """The policy for clients that crash, miss the deadline or send an unusable update.

    Metrics and the report name these clients. The aggregate averages over the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    deadline: float | None = Field(None, gt=0)
    """Seconds within which a round's updates must arrive; null for no limit. The in-process engine lets a client that has started finish."""
    min_updates: int = Field(1, gt=0)
    """Minimum number of usable updates per round. A method may need more (Krum)."""
    below: Literal["stop", "wait", "skip"] = "stop"
    """What to do with fewer updates: ``stop`` with an error, after which --resume continues the run; ``wait`` and retry the clients whose updates
    are missing; or ``skip`` the round, which leaves the weights unchanged."""
    attempts: int = Field(5, gt=1, json_schema_extra=ADVANCED)
    """Maximum number of attempts per round if ``below`` is ``wait``; then the run stops."""
    pause: float = Field(10.0, ge=0, json_schema_extra=ADVANCED)
    """Seconds before a retry, which give a crashed client time to restart."""
    norm_limit: float | None = Field(10.0, ge=1, json_schema_extra=ADVANCED)
    """Refuse an update whose norm exceeds this factor times the sum of what training can reach (``training.settings.reach``) and the norm of the
    received weights. Control variates (SCAFFOLD) are refused if the root mean square of their entries exceeds this factor. Null accepts any norm.
    Updates of clients that withhold their number of samples are not checked, because their reach is unknown."""

    def needed(self, smallest_cohort: int, cohort: int) -> int:
        """Return the number of updates that complete a round.

        Args:
            smallest_cohort: the number of updates that the method needs.
            cohort: the number of clients in a round; 1 in a baseline, which is a federation with one client.
        """
        return min(max(self.min_updates, smallest_cohort), cohort)


NONE_EXPECTED = FailureConfig()
"""The default policy."""
