"""What there is to choose from, as it was recorded: the commands that list it import nothing that trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from fedmllm.types import Record

FILE = Path(__file__).with_name("catalog.json")
"""Written by ``docs/generate.py`` from the code it describes; a test compares them."""


def recorded() -> Record:
    """``methods`` and ``strategies`` as of ``methods_view.catalog``, ``models`` as of ``models_view.catalog``."""
    return cast(Record, json.loads(FILE.read_text(encoding="utf-8")))
