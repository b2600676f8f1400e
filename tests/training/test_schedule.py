"""The learning rate over rounds and over the steps of a round."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.config import Experiment
from fedmllm.errors import ConfigError
from fedmllm.training.schedule import ScheduleConfig, of_step
from fedmllm.training.settings import TrainingConfig, round_learning_rate


def test_learning_rate_falls_over_rounds() -> None:
    config = TrainingConfig(learning_rate=2.0)
    rates = [round_learning_rate(config, r, 4) for r in range(4)]
    assert rates == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5])
    assert round_learning_rate(TrainingConfig(learning_rate=2.0, schedule=ScheduleConfig(over="none")), 3, 4) == 2.0
    for over, last in (("rounds", 1 - 0.5**0.5), ("both", 1 - 0.5**0.5), ("steps", 2.0)):
        config = TrainingConfig(learning_rate=2.0, schedule=ScheduleConfig(over=over))  # type: ignore[arg-type]
        assert round_learning_rate(config, 3, 4) == pytest.approx(last)


def test_learning_rate_of_a_step() -> None:
    """4 steps: cos(0), cos(pi/4), cos(pi/2), cos(3 pi/4). A warmup of a quarter of 8 steps: a half and the whole, then 6 steps of cosine."""
    plain, warm = ScheduleConfig(over="steps"), ScheduleConfig(over="both", warmup=0.25)
    assert [of_step(plain, i, 4) for i in range(4)] == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert [of_step(warm, i, 8) for i in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.5 + 0.25 * 3**0.5])
    assert of_step(ScheduleConfig(), 3, 4) == of_step(ScheduleConfig(over="none"), 3, 4) == 1.0
    assert of_step(ScheduleConfig(over="steps", warmup=0.01), 0, 1) == 1.0


@given(steps=st.integers(1, 300), warmup=st.floats(0, 0.99))
def test_every_step_has_a_rate_of_at_most_the_rounds_rate(steps: int, warmup: float) -> None:
    rates = [of_step(ScheduleConfig(over="steps", warmup=warmup), i, steps) for i in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["cosine"], r"must be cosine or constant, or a mapping .* got \['cosine'\]"),
        ("cosin", r"training\.schedule: must be cosine or constant, or a mapping such as \{over: steps, warmup: 0\.01\}, got 'cosin'"),
        ({"over": "rounds", "warmup": 0.1}, r"warmup: 0\.1 is a share of a round's steps, but over is rounds; set over to steps or both"),
        ({"over": "steps", "warm": 0.1}, r"training\.schedule\.warm: is not a known setting; did you mean warmup\?"),
        ({"over": "steps", "warmup": 1}, r"training\.schedule.*less than 1"),
    ],
)
def test_invalid_schedules_are_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Experiment.parse({"training": {"schedule": value}})


def test_schedules_survive_yaml() -> None:
    for value in ("cosine", "constant", {"over": "both", "warmup": 0.01}):
        experiment = Experiment.parse({"training": {"schedule": value}})
        assert Experiment.from_yaml(experiment.to_yaml()) == experiment
        assert experiment.model_dump(mode="json")["training"]["schedule"] == value
