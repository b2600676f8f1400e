"""Reads YAML settings files. It imports little, so that a broken file is reported before slow imports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from fedmllm.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import JsonValue

Path_ = tuple[str, ...]
"""The keys that lead from the top of a file to a setting."""
ADVANCED: dict[str, JsonValue] = {"advanced": True}
"""Marks a setting that few experiments change. Documentation lists these settings apart from the others."""


class Kind(NamedTuple):
    """The kind of a settings file, for error messages.

    Attributes:
        content: what the file must contain.
        remedy: what to do if the file does not exist.
    """

    content: str
    remedy: str


EXPERIMENT = Kind("an experiment is a mapping of sections such as 'data:'", "give an experiment in YAML, e.g. experiments/quickstart.yaml")
GRID = Kind("a grid is a mapping of lists such as 'methods:'", "give a grid in YAML, e.g. experiments/nano/settings.yaml")
SITES = Kind("server.yaml and site.yaml are mappings of settings", "fedmllm site init writes it")


def read_settings(path: Path, kind: Kind = EXPERIMENT) -> tuple[dict[str, Any], dict[Path_, str]]:
    """Return a file's settings, and the ``file:line`` of each by its keys. An empty file has none.

    Raises:
        ConfigError: if the file does not exist, is not a YAML mapping, or sets a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; {kind.remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}); {kind.remedy}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if root is None or values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: {kind.content}; found {type(values).__name__}")
    places: dict[Path_, str] = {}
    _locate(root, (), str(path), places)
    return values, places


def _locate(node: yaml.Node, path: Path_, file: str, places: dict[Path_, str]) -> None:
    """Record the line of every key. Raise an error if a mapping contains a key twice, which the YAML parser accepts silently."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        here = (*path, str(key.value))
        place = f"{file}:{key.start_mark.line + 1}"
        if here in places:
            raise ConfigError(f"{place}: {'.'.join(here)} is set twice, first at {places[here]}; remove one")
        places[here] = place
        _locate(value, here, file, places)
