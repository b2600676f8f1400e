"""Indexes of what is chosen by name in settings: a class for each name, whose fields are its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedmllm.errors import ConfigError
from fedmllm.explain import meant

Value = bool | int | float
"""Of a parameter."""


def built(index: Mapping[str, type[Any]], what: str, name: str, parameters: Mapping[str, Value]) -> Any:
    """An entry of an index with its parameters.

    Args:
        index: dataclasses by name.
        what: they are, for errors.
        name: of the entry.
        parameters: its fields by name; those left out keep their defaults.

    Raises:
        ConfigError: if there is no such name or parameter, or a value breaks a rule.
    """
    if name not in index:
        raise ConfigError(f"name: {name!r} is no {what}{meant(name, index)}")
    own = [field.name for field in dataclasses.fields(index[name])]
    if unknown := sorted(parameters.keys() - set(own)):
        raise ConfigError(f"parameters: {name} has no {unknown[0]!r}; it takes {', '.join(own) or 'none'}")
    try:
        return index[name](**parameters)
    except ConfigError as error:
        raise ConfigError(f"parameters: {error}") from error
