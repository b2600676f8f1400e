"""Whether Flower is installed, asked without importing it."""

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
"""Neither Flower nor Ray calls home or installs anything."""


def require_flower(*modules: str) -> None:
    """Refuse the engine where Flower, or one of these modules, is not installed.

    Raises:
        ConfigError: naming what to install.
    """
    if missing := [name for name in ("flwr", *modules) if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"engine.name: flower needs {' and '.join(missing)}; pip install 'fedmllm[flower]', or use in_process")
    os.environ |= QUIET
