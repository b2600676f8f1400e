"""Checks of hyperparameters."""

from __future__ import annotations

from fedmllm.errors import ConfigError


def require_within(name: str, value: float, low: float, high: float) -> None:
    """Require a hyperparameter in [low, high).

    Raises:
        ConfigError: if it is outside; the message names it.
    """
    if not low <= value < high:
        raise ConfigError(f"{name} must be in [{low:g}, {high:g}), got {value}")


def require_positive(**values: float) -> None:
    """Require hyperparameters greater than 0.

    Raises:
        ConfigError: if one is not; the message names the first.
    """
    for name, value in values.items():
        if value <= 0:
            raise ConfigError(f"{name} must be greater than 0, got {value}")


def require_not_negative(**values: float) -> None:
    """Require hyperparameters of at least 0.

    Raises:
        ConfigError: if one is negative; the message names the first.
    """
    for name, value in values.items():
        if value < 0:
            raise ConfigError(f"{name} must not be negative, got {value}")
