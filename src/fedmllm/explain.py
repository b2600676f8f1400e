"""What is wrong with a setting, in plain words: the rule, the value, and what may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

_RULES = {
    "missing": "is needed",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false"),
    **dict.fromkeys(("tuple_type", "list_type"), "must be a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be a section of settings"),
    "string_type": "must be text",
    "path_type": "must be a path",
    "finite_number": "must be finite",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be {le} at most",
    "literal_error": "must be {expected}",
    "too_short": "must have {min_length} or more entries",
    "string_pattern_mismatch": "must be of the form {pattern}",
}
_YAML = "; quote it, for YAML reads yes, no, on, off, true and false as true and false"


def rule(detail: Mapping[str, Any], known: Collection[str] = ()) -> str:
    """What one error of a ``ValidationError`` says.

    Args:
        detail: the error.
        known: settings there are where an unknown one was given.
    """
    kind, value = detail["type"], detail["input"]
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "extra_forbidden":
        return f"is no known setting{meant(str(detail['loc'][-1]), known)}"
    text = _RULES[kind].format(**detail.get("ctx", {})) if kind in _RULES else str(detail["msg"])
    if kind == "missing":
        return text
    if kind == "string_type" and isinstance(value, bool):
        return f"{text}, is {str(value).lower()}{_YAML}"
    return text if isinstance(value, dict) or hasattr(value, "model_fields") else f"{text}, is {value!r}"


def meant(name: str, known: Collection[str]) -> str:
    """``; did you mean ...?`` with the nearest of what is known, else all of it; empty if nothing is."""
    if near := difflib.get_close_matches(name.lower(), known, n=1):
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(known)}" if known else ""
