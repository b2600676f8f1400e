"""What a stage's models score: the global one, or those that a personalized method leaves with its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedmllm.algorithms import ServerState
from fedmllm.engine.base import Split
from fedmllm.engine.stages import Stage
from fedmllm.evaluation.metrics import error_over_models, over_models
from fedmllm.types import Metrics, Weights

if TYPE_CHECKING:
    from fedmllm.engine.rounds import Loop


def personal_models(loop: Loop, stage: Stage, state: ServerState) -> dict[str, Weights]:
    """The weights each client ends with, by client: the global ones, unless the method gives it its own. None where those are at remote
    clients."""
    if not loop.algorithm.personalized:
        return dict.fromkeys(sorted(stage.clients), state.weights)
    if loop.engine.remote:
        return {}
    assignment = loop.assignment(stage, state)
    return {client: assignment.personal(client) for client in sorted(stage.clients)}


def evaluate_state(loop: Loop, stage: Stage, state: ServerState, split: Split | None = None) -> Metrics:
    """The scores of the global model on a split, the test split by default; of a personalized method, those of the clients' own models, averaged.

    The standard error of an average over several clients is that over the clients.
    """
    asked = split or loop.test
    if not loop.algorithm.personalized:
        return asked.score(state.weights, state.base)
    rows = list(loop.engine.scores(loop.assignment(stage, state), sorted(stage.clients), asked).values())
    error = error_over_models([row["score"] for row in rows])
    return over_models(rows) | ({} if error is None else {"standard_error": error})


def validate_state(loop: Loop, stage: Stage, state: ServerState) -> Metrics | None:
    """The same on the validation part; None where there is none."""
    return None if loop.validation is None else evaluate_state(loop, stage, state, loop.validation)
