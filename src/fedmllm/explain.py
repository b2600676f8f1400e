"""Explains in plain words why a setting is invalid: the rule, the value, and the likely intended name."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

_LOG = logging.getLogger(__name__)

_RULES = {
    "missing": "is required",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "must be an integer"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a section of settings"),
    "string_type": "must be text",
    "path_type": "must be a path",
    "finite_number": "must be finite",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "too_short": "must have at least {min_length} entries",
    "string_pattern_mismatch": "must match {pattern}",
}
_YAML = "; quote it, because YAML reads yes, no, on, off, true and false as true and false"


def rule(detail: Mapping[str, Any], known: Collection[str] = ()) -> str:
    """Return one error of a pydantic ``ValidationError`` as text.

    Args:
        detail: the error.
        known: the settings that exist at the same place, for errors about an unknown setting.
    """
    kind, value = detail["type"], detail["input"]
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "extra_forbidden":
        return f"is not a known setting{meant(str(detail['loc'][-1]), known)}"
    text = _RULES[kind].format(**detail.get("ctx", {})) if kind in _RULES else str(detail["msg"])
    if kind == "missing":
        return text
    if kind == "string_type" and isinstance(value, bool):
        return f"{text}, got {str(value).lower()}{_YAML}"
    return text if isinstance(value, dict) or hasattr(value, "model_fields") else f"{text}, got {value!r}"


def meant(name: str, known: Collection[str]) -> str:
    """Return ``; did you mean ...?`` with the closest known name, else the list of known names; empty if there are none."""
    if near := difflib.get_close_matches(name.lower(), known, n=1):
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(known)}" if known else ""


@cache
def tell_renamed(former: str, name: str) -> None:
    """Log a warning that a former name was used, once per process and name."""
    _LOG.warning("%s is now called %s; please write the new name", former, name)
