"""Scores of a stage's models: the global model, or the personalized models of a method that has them."""

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
    """Return each client's final weights, by client.

    These are the global weights if the method has no personalized models. The result is empty if personalized models are on remote clients.
    """
    if not loop.algorithm.personalized:
        return dict.fromkeys(sorted(stage.clients), state.weights)
    if loop.engine.remote:
        return {}
    assignment = loop.assignment(stage, state)
    return {client: assignment.personal(client) for client in sorted(stage.clients)}


def evaluate_state(loop: Loop, stage: Stage, state: ServerState, split: Split | None = None) -> Metrics:
    """Return the scores of the global model on a split or, for a personalized method, the mean scores of the clients' personalized models.

    The standard error of a mean over several clients is computed over the clients.

    Args:
        loop: what all stages share.
        stage: the stage.
        state: the server state to score.
        split: the split; the test split by default.
    """
    target = split or loop.test
    if not loop.algorithm.personalized:
        return target.score(state.weights, state.base)
    rows = list(loop.engine.scores(loop.assignment(stage, state), sorted(stage.clients), target).values())
    error = error_over_models([row["score"] for row in rows])
    return over_models(rows) | ({} if error is None else {"standard_error": error})


def validate_state(loop: Loop, stage: Stage, state: ServerState) -> Metrics | None:
    """Return the same scores on the validation split, or None if the run has none."""
    return None if loop.validation is None else evaluate_state(loop, stage, state, loop.validation)
