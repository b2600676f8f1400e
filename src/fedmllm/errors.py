"""Every error the package raises on purpose.

A message states the rule that was broken, the value that broke it, what to do about it and where the value stands
(file and line, or the configuration field). The command line prints these messages without a traceback and exits
with ``FedMLLMError.exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterable


class FedMLLMError(Exception):
    """Base class: catch this to catch everything the package raises on purpose."""

    exit_code = 2


class ConfigError(FedMLLMError, ValueError):
    """A setting is unknown, out of range or contradicts another one. A ``ValueError`` too, as pydantic's validators need it."""


class DataError(FedMLLMError):
    """A data file, a sample or a split breaks a rule of its format."""


class ModelError(FedMLLMError):
    """A model folder, its processor or its adapter cannot be used as asked."""


class FederationError(FedMLLMError):
    """A round cannot be completed: no usable updates, no weight, or a client with nothing to train on."""

    exit_code = 1


class RunError(FedMLLMError):
    """A run folder is missing, incomplete or belongs to another experiment."""


MAX_LISTED = 20
"""How many offending items one error message spells out before it only counts them."""


def listing(problems: Iterable[str]) -> str:
    """One problem a line, indented, cut after ``MAX_LISTED``."""
    rows = list(problems)
    shown = [f"  - {row}" for row in rows[:MAX_LISTED]]
    if len(rows) > MAX_LISTED:
        shown.append(f"  ... and {len(rows) - MAX_LISTED} more")
    return "\n".join(shown)
