"""How clients train between two exchanges, and how far that can take them."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

from fedmllm.training.schedule import ScheduleConfig, of_round


class TrainingConfig(BaseModel):
    """How a client trains between two exchanges."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    local_epochs: int = Field(1, ge=0)
    """Passes over the client's samples per round; 0 sends back a zero update."""
    batch_size: int = Field(4, gt=0)
    """Samples per micro-batch."""
    accumulation: int = Field(1, gt=0)
    """Micro-batches per optimizer step."""
    learning_rate: float = Field(1e-3, gt=0)
    """AdamW's largest step size."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the learning rate goes."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the gradient's mean."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay of the gradient's square."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest norm of a step's gradient over all tensors; null for none."""
    max_batch_tokens: int | None = Field(None, gt=0)
    """Padded tokens of one forward pass; the micro-batches of a step run as one batch as far as they fit. Null for what suits the device."""


def round_learning_rate(config: TrainingConfig, round_num: int, num_rounds: int) -> float:
    """A round's: the configured one times the schedule's factor of the round."""
    return config.learning_rate * of_round(config.schedule, round_num, num_rounds)


def reach(config: TrainingConfig, learning_rate: float, num_samples: int, num_entries: int) -> float:
    """How far from where it began AdamW can get, as a Euclidean norm over all entries and without weight decay.

    By Cauchy and Schwarz a step t moves an entry by ``lr c_t`` at most, whatever the gradients were:

        c_t^2 = sum_i a_i^2 / b_i,  a_i = (1 - beta1) beta1^(t - i) / (1 - beta1^t),  b_i likewise of beta2,

    so that all steps come to ``lr sqrt(num_entries) sum_t c_t``. It is infinite for long turns with ``beta1^2 >= beta2``.
    """
    steps = config.local_epochs * math.ceil(num_samples / (config.batch_size * config.accumulation))
    beta1, beta2 = config.beta1, config.beta2
    ratio = beta1**2 / beta2 if beta2 else math.inf if beta1 else 0.0
    total, series, size = 0.0, 1.0, 0.0
    # By then c_t has settled, if it does; a client that claims ever so many samples does not keep the server here.
    for t in range(1, min(steps, 1000) + 1):
        size = (1 - beta1) / (1 - beta1**t) * math.sqrt((1 - beta2**t) / (1 - beta2) * series)
        total, series = total + size, 1 + series * ratio
    rest = (steps - 1000) * (size if ratio < 1 else math.inf) if steps > 1000 else 0.0
    return learning_rate * math.sqrt(num_entries) * (total + rest)
