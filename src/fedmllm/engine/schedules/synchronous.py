"""Communication-Efficient Learning of Deep Networks from Decentralized Data. McMahan et al., AISTATS 2017. One cohort per round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedmllm.algorithms import NONE_OUTSTANDING, Algorithm, Outstanding, ServerState
from fedmllm.engine.stages import Stage

if TYPE_CHECKING:
    from fedmllm.engine.rounds import Loop, Round


@dataclass(frozen=True)
class Synchronous:
    """Every round samples a cohort, waits for all its clients, and steps. It takes answers in the cohort's order, so that sums are reproducible."""

    def require(self, algorithm: Algorithm, method: str, num_clients: int, cohort: int) -> None:
        """Accept every method and every number of clients."""

    def updates(self, cohort: int) -> int:
        """Return the size of the cohort."""
        return cohort

    def concurrent(self, cohort: int) -> int:
        """Return the size of the cohort."""
        return cohort

    def resume(self, loop: Loop, stage: Stage, state: ServerState) -> None:
        """Do nothing: no client is outstanding between rounds."""

    def collect(self, this: Round) -> Outstanding:
        """Train the cohort. If ``failures.below`` is ``wait``, retry the clients whose updates are missing."""
        cohort = this.cohort()

        def missing() -> list[str]:
            return [name for name in cohort if name not in this.intake.accepted]

        this.complete_by(lambda attempt: self._ask(this, missing()), missing)
        return NONE_OUTSTANDING

    def _ask(self, this: Round, clients: list[str]) -> None:
        """Submit tasks to clients and take one answer from each."""
        engine, outstanding = this.loop.engine, dict.fromkeys(clients)
        engine.submit(this.assignment, {name: this.stage.clients[name] for name in clients})
        this.tell(clients)
        for answer in engine.completed(clients):
            outstanding.pop(answer.client, None)
            this.tell(list(outstanding))
            this.take(answer)
