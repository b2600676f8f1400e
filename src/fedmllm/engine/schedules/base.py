"""What a schedule is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fedmllm.algorithms import Algorithm, Outstanding, ServerState
from fedmllm.engine.stages import Stage

if TYPE_CHECKING:
    from fedmllm.engine.rounds import Loop, Round


class Schedule(Protocol):
    """Decides who is asked when, and when the server steps. Instances hold settings only; what is outstanding is in the server's state."""

    def require(self, algorithm: Algorithm, method: str, num_clients: int, cohort: int) -> None:
        """Refuse a method, or numbers of clients, that it cannot work with.

        Args:
            algorithm: the method.
            method: its name, for the error.
            num_clients: of the federation.
            cohort: ``federation.clients_per_round``.

        Raises:
            ConfigError: naming what contradicts what.
        """
        ...

    def updates(self, stage: Stage) -> int:
        """How many updates the server steps on."""
        ...

    def concurrency_of(self, stage: Stage) -> int:
        """How many clients train at once, at most."""
        ...

    def resume(self, loop: Loop, stage: Stage, state: ServerState) -> None:
        """Ask those clients again, before the first round, that are outstanding in a state."""
        ...

    def collect(self, this: Round) -> Outstanding:
        """Ask clients, and take answers until the server can step.

        Returns:
            who is still outstanding.

        Raises:
            FederationError: if too few updates can be used, and the run is not to go on without.
        """
        ...
