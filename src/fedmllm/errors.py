"""The errors that the package raises deliberately.

A message states the rule, the value that breaks it, the remedy, and the location of the value (file and line, or
setting). The command line prints the message without a traceback and exits with ``FedMLLMError.exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterable


class FedMLLMError(Exception):
    """Base class of all errors that the package raises deliberately."""

    exit_code = 2


class ConfigError(FedMLLMError, ValueError):
    """A setting is unknown, out of range, or contradicts another one. It is also a ``ValueError``, which pydantic's validators require."""


class DataError(FedMLLMError):
    """A data file, a sample or a split is invalid."""


class ModelError(FedMLLMError):
    """A model, its processor or its adapter cannot be used as requested."""


class FederationError(FedMLLMError):
    """A round cannot be completed, for example because there is no usable update or a client has no samples."""

    exit_code = 1


class RunError(FedMLLMError):
    """A run folder is missing or incomplete, or belongs to another experiment."""


MAX_LISTED = 20
"""Maximum number of problems listed in one error message. The rest are only counted."""


def listing(problems: Iterable[str]) -> str:
    """Return the problems as indented lines, at most ``MAX_LISTED`` of them, followed by the number of the rest."""
    rows = list(problems)
    shown = [f"  - {row}" for row in rows[:MAX_LISTED]]
    if len(rows) > MAX_LISTED:
        shown.append(f"  ... and {len(rows) - MAX_LISTED} more")
    return "\n".join(shown)
