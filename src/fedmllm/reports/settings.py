"""The settings of an experiment with their defaults, rules and meanings: for ``fedmllm settings`` and ``docs/configuration.md``."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedmllm.config import Experiment
from fedmllm.reports.methods import first_paragraph
from fedmllm.types import Record

TOP = "top level"
"""Name in the catalog for the settings that belong to no section."""
_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
_WORDS = {type(None): "null", str: "text", Path: "path", tuple: "list of {}", dict: "mapping of {} to {}", Any: "anything"}


def catalog() -> Record:
    """Return every section of an experiment by its path of keys, as JSON. A section that is part of another follows it."""
    return {TOP: section(Experiment), **_sections(Experiment)}


def _sections(model: type[BaseModel], path: str = "") -> Record:
    found: Record = {}
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            inner = type(field.default)
            found |= {path + name: section(inner), **_sections(inner, f"{path}{name}.")}
    return found


def section(model: type[BaseModel]) -> Record:
    """Return a section's summary and its settings by name, as JSON. Settings that are sections themselves are left out."""
    fields = {name: field for name, field in model.model_fields.items() if not isinstance(field.default, BaseModel)}
    meanings = _meanings(model)
    return {
        "summary": first_paragraph(model.__doc__),
        "settings": {name: _described(field) | {"meaning": meanings[name]} for name, field in fields.items()},
    }


def _described(field: FieldInfo) -> Record:
    """Return a setting's type, default and rule, and whether few experiments change it. A required setting has no default."""
    rules = [f"{text} {getattr(m, sign):g}" for m in field.metadata for sign, text in _SIGNS.items() if hasattr(m, sign)]
    default = None if field.is_required() else json.dumps(field.get_default(call_default_factory=True, validated_data={}))
    extra = field.json_schema_extra
    advanced = isinstance(extra, dict) and bool(extra.get("advanced"))
    return {"type": _type(field.annotation), "default": default, "rule": " and ".join(rules), "advanced": advanced}


def _meanings(model: type[BaseModel]) -> dict[str, str]:
    """Return what each setting means: the string below it in the source."""
    body: Any = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    return {
        a.target.id: first_paragraph(ast.literal_eval(b.value))
        for a, b in pairwise(body.body)
        if isinstance(a, ast.AnnAssign) and isinstance(a.target, ast.Name) and isinstance(b, ast.Expr)
    }


def _type(kind: Any) -> str:
    """Return a type in words."""
    if get_origin(kind) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(kind))
    parts = [_type(part) for part in get_args(kind) if part is not ...]
    return _WORDS.get(get_origin(kind), " or ".join(parts)).format(*parts) if parts else _WORDS.get(kind, kind.__name__)
