"""The interface of a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fedmllm.algorithms import Algorithm, Outstanding, ServerState
from fedmllm.engine.stages import Stage

if TYPE_CHECKING:
    from fedmllm.engine.rounds import Loop, Round


class Schedule(Protocol):
    """Decides when clients receive tasks and when the server steps. Instances hold settings only; the server state holds outstanding clients."""

    def require(self, algorithm: Algorithm, method: str, num_clients: int, cohort: int) -> None:
        """Check that the schedule supports a method and the numbers of clients.

        Args:
            algorithm: the method.
            method: the method's name, for the error message.
            num_clients: number of clients in the federation.
            cohort: ``federation.clients_per_round``.

        Raises:
            ConfigError: if it does not; the message names the settings that contradict each other.
        """
        ...

    def updates(self, cohort: int) -> int:
        """Return the number of updates that the server needs for a step."""
        ...

    def concurrent(self, cohort: int) -> int:
        """Return the maximum number of clients that train at the same time."""
        ...

    def resume(self, loop: Loop, stage: Stage, state: ServerState) -> None:
        """Resubmit the tasks of the clients that are outstanding in a state, before the first round of a resumed run."""
        ...

    def collect(self, this: Round) -> Outstanding:
        """Submit tasks to clients and take answers until the server can step.

        Returns:
            The clients that are still outstanding.

        Raises:
            FederationError: if there are too few usable updates and ``failures.below`` is not ``skip``.
        """
        ...
