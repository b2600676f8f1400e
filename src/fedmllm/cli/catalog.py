"""The recorded catalog of methods, strategies, models and settings, which commands list without heavy imports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

from fedmllm.types import Record

FILE = Path(__file__).with_name("catalog.json")
"""``docs/generate.py`` writes this file from the code; a test checks that it is up to date."""


def recorded() -> Record:
    """Return the catalogs of ``reports.methods`` (``methods``, ``strategies``), ``reports.models`` (``models``) and ``reports.settings`` (``settings``)."""
    return cast(Record, json.loads(FILE.read_text(encoding="utf-8")))
