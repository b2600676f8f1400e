"""Registries of classes that settings choose by name. The fields of a class are its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedmllm.errors import ConfigError
from fedmllm.explain import meant

Value = bool | int | float
"""The value of a parameter."""


def built(index: Mapping[str, type[Any]], what: str, name: str, parameters: Mapping[str, Value]) -> Any:
    """Return an instance of a registered class.

    Args:
        index: dataclasses by name.
        what: what the classes are, for error messages.
        name: name of the class.
        parameters: values of its fields by name; fields not given keep their defaults.

    Raises:
        ConfigError: if the name or a parameter does not exist, or a value is invalid.
    """
    if name not in index:
        raise ConfigError(f"name: {name!r} is not a known {what}{meant(name, index)}")
    own = [field.name for field in dataclasses.fields(index[name])]
    if unknown := sorted(parameters.keys() - set(own)):
        raise ConfigError(f"parameters: {name} has no parameter {unknown[0]!r}; it takes {', '.join(own) or 'none'}")
    try:
        return index[name](**parameters)
    except ConfigError as error:
        raise ConfigError(f"parameters: {error}") from error
