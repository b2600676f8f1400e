"""The messages about rows that a loader cannot use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedmllm.errors import DataError


def bad_rows(load: Callable[..., object], *arguments: Any, **named: Any) -> list[str]:
    """The lines of the loader's error after the first line."""
    with pytest.raises(DataError) as error:
        load(*arguments, **named)
    return [row.removeprefix("  - ") for row in str(error.value).splitlines()[1:]]
