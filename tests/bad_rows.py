"""What a loader says of rows that it cannot use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedmllm.errors import DataError


def bad_rows(load: Callable[..., object], *arguments: Any, **named: Any) -> list[str]:
    """The lines of its one error, without the first."""
    with pytest.raises(DataError) as error:
        load(*arguments, **named)
    return [row.removeprefix("  - ") for row in str(error.value).splitlines()[1:]]
