"""The recorded catalog of methods, strategies and models, so that commands can list them without heavy imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from fedmllm.types import Record

FILE = Path(__file__).with_name("catalog.json")
"""``docs/generate.py`` writes this file from the code; a test checks that it is up to date."""


def recorded() -> Record:
    """Return ``methods`` and ``strategies`` as in ``report.methods.catalog``, and ``models`` as in ``report.models.catalog``."""
    return cast(Record, json.loads(FILE.read_text(encoding="utf-8")))
