"""Settings of local training, and a bound on how far it can move the weights."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

from fedmllm.settings_file import ADVANCED
from fedmllm.training.schedule import ScheduleConfig, of_round


class TrainingConfig(BaseModel):
    """Local training: how a client trains in each round."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    local_epochs: int = Field(1, ge=0)
    """Passes over the client's samples per round. With 0 the update is zero."""
    batch_size: int = Field(4, gt=0)
    """Samples per micro-batch."""
    accumulation: int = Field(1, gt=0)
    """Micro-batches per optimizer step."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW's peak learning rate. ``schedule`` lowers it over time."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning-rate schedule."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    beta1: float = Field(0.9, ge=0, lt=1, json_schema_extra=ADVANCED)
    """AdamW's decay rate for the mean of the gradient."""
    beta2: float = Field(0.95, ge=0, lt=1, json_schema_extra=ADVANCED)
    """AdamW's decay rate for the mean of the squared gradient."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Gradients are clipped to this norm over all tensors in each step; null disables clipping."""
    max_batch_tokens: int | None = Field(None, gt=0, json_schema_extra=ADVANCED)
    """Maximum number of tokens in a forward pass, padding included. The micro-batches of a step run as one batch if they fit. Null chooses a
    value for the device."""


def round_learning_rate(config: TrainingConfig, round_num: int, num_rounds: int) -> float:
    """Return the learning rate of a round: the configured one times the schedule's factor for the round."""
    return config.learning_rate * of_round(config.schedule, round_num, num_rounds)


def reach(config: TrainingConfig, learning_rate: float, num_samples: int, num_entries: int) -> float:
    """Return an upper bound on the distance that AdamW can move the weights in a round, as a Euclidean norm over all entries.

    The bound ignores weight decay. By the Cauchy-Schwarz inequality, step t moves an entry by at most ``lr c_t``, whatever the gradients:

        c_t^2 = sum_i a_i^2 / b_i,  a_i = (1 - beta1) beta1^(t - i) / (1 - beta1^t),  b_i likewise with beta2,

    so the bound is ``lr sqrt(num_entries) sum_t c_t``. It is infinite for more than 1,000 steps with ``beta1^2 >= beta2``.

    Args:
        config: the training settings.
        learning_rate: the learning rate of the round.
        num_samples: the client's number of samples.
        num_entries: number of trainable entries.
    """
    steps = config.local_epochs * math.ceil(num_samples / (config.batch_size * config.accumulation))
    beta1, beta2 = config.beta1, config.beta2
    ratio = beta1**2 / beta2 if beta2 else math.inf if beta1 else 0.0
    total, series, size = 0.0, 1.0, 0.0
    # After 1,000 steps c_t has converged, if it converges. The limit keeps the loop short even if a client claims a huge number of samples.
    for t in range(1, min(steps, 1000) + 1):
        size = (1 - beta1) / (1 - beta1**t) * math.sqrt((1 - beta2**t) / (1 - beta2) * series)
        total, series = total + size, 1 + series * ratio
    rest = (steps - 1000) * (size if ratio < 1 else math.inf) if steps > 1000 else 0.0
    return learning_rate * math.sqrt(num_entries) * (total + rest)
