"""Checks that Flower is installed, without importing it."""

from __future__ import annotations

import importlib.util
import os

from fedmllm.errors import ConfigError

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment variables that stop Flower and Ray from sending telemetry, checking for updates and installing packages."""


def require_flower(*modules: str) -> None:
    """Check that Flower and further modules are installed, and set the ``QUIET`` environment variables.

    Raises:
        ConfigError: naming the missing modules and how to install them.
    """
    if missing := [name for name in ("flwr", *modules) if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"engine.name: flower needs {' and '.join(missing)}; run pip install 'fedmllm[flower]', or use in_process")
    os.environ |= QUIET
