"""Indexes of what settings choose by name, and what plugins add to them.

A room makes its index with ``index``; code from outside adds to one with ``register``, before or after the room is imported. A plugin is a
module, a Python file or an entry point of the group ``fedmllm.plugins`` that registers things when it is imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fedmllm.errors import ConfigError
from fedmllm.explain import meant

T = TypeVar("T")
Value = bool | int | float
"""Of a hyper-parameter."""
GROUP = "fedmllm.plugins"
"""The entry points that are imported in every process that reads an experiment."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_INDEXES: dict[str, dict[str, Any]] = {}
_WAITING: dict[str, dict[str, Any]] = {}
"""What was registered before its index was made."""
_ORIGINS: dict[tuple[str, str], str] = {}
_LOADED: dict[str, ModuleType] = {}
_LOADING: list[str] = []
"""Plugins that are being imported."""
_ALLOWED: list[frozenset[str]] = []
"""At a site, the plugins that its own settings name; no others are imported there."""


def index(kind: str, rows: dict[str, T]) -> dict[str, T]:
    """Return a room's index of a kind of thing, with what plugins have registered for it.

    Raises:
        ConfigError: if a plugin has registered a thing under a name of the package.
    """
    waiting = _WAITING.get(kind, {})
    if taken := sorted(waiting.keys() & rows.keys()):
        raise _taken(kind, taken[0], _ORIGINS[kind, taken[0]], "fedmllm")
    rows |= waiting
    _INDEXES[kind] = rows
    return rows


def register(kind: str, name: str, thing: T, allowed: re.Pattern[str] = _NAME, rule: str = "lowercase letters, digits, _ - and .") -> T:
    """Add a thing to the index of its kind.

    Args:
        kind: what the thing is; names are unique within a kind.
        name: by which settings choose it.
        thing: any object.
        allowed: pattern of a kind's names.
        rule: the pattern in words.

    Raises:
        ConfigError: if the name is taken or not allowed.
    """
    rows = _INDEXES[kind] if kind in _INDEXES else _WAITING.setdefault(kind, {})
    # An instance knows the module of its class only. The same place may register again, as a notebook's cell that runs twice.
    origin = _LOADING[-1] if _LOADING else getattr(thing, "__module__", "__main__") if callable(thing) else "__main__"
    if not allowed.fullmatch(name):
        raise ConfigError(f"plugins: {name!r} cannot name a {kind}; use {rule}")
    if name in rows and _ORIGINS.get((kind, name)) != origin:
        raise _taken(kind, name, origin, origin_of(kind, name))
    rows[name], _ORIGINS[kind, name] = thing, origin
    return thing


def _taken(kind: str, name: str, origin: str, holder: str) -> ConfigError:
    return ConfigError(f"plugins: {kind} {name!r} of {origin} exists already, from {holder}; choose another name")


def origin_of(kind: str, name: str) -> str:
    """Return the module that registered a thing; ``fedmllm`` for those of the package."""
    return _ORIGINS.get((kind, name), "fedmllm")


def added(kind: str) -> dict[str, str]:
    """Return the names that plugins added to an index, with the module each came from."""
    return {name: origin for (of, name), origin in _ORIGINS.items() if of == kind}


def require_hyper_parameters(cls: type[Any], reserved: Sequence[str]) -> None:
    """Refuse a class whose fields cannot be hyper-parameters in a settings file.

    Args:
        cls: to be a method, a strategy or a schedule.
        reserved: class attributes that say what it is, such as ``kind``. With an annotation one becomes a field, and so a setting.

    Raises:
        ConfigError: if the class is no frozen dataclass, a field has no default, or shadows a reserved attribute.
    """
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ConfigError(f"plugins: {cls.__name__} must be a frozen dataclass, whose fields are its hyper-parameters")
    for own in dataclasses.fields(cls):
        if own.name in reserved:
            raise ConfigError(f"plugins: {cls.__name__}.{own.name} says what the class is; write it without an annotation")
        if own.default is dataclasses.MISSING:
            raise ConfigError(f"plugins: {cls.__name__}.{own.name} needs a default, as every hyper-parameter does")


def load_plugins(names: Sequence[str] = (), installed: bool = True) -> None:
    """Import plugins, each once in a process.

    Args:
        names: importable modules, or paths of Python files, which end in ``.py``.
        installed: whether to import those of installed packages too.

    Raises:
        ConfigError: if one does not exist, cannot be imported, or is not allowed at this site.
    """
    if _ALLOWED:
        if foreign := [name for name in names if name not in _ALLOWED[0]]:
            raise ConfigError(f"plugins: {foreign[0]!r} is not in this site's own settings; nothing else is imported here")
    elif installed:
        for name in installed_plugins():
            _load(name)
    for name in names:
        _load(name)


def restrict(names: Sequence[str]) -> None:
    """Import these plugins, and refuse all others in this process from now on, installed ones included."""
    _ALLOWED[:] = [frozenset(names)]
    load_plugins(names)


def resolved(names: object, folder: Path) -> object:
    """Return plugins with the paths of files made absolute; relative ones are relative to the folder of the settings that name them."""
    if not isinstance(names, list):
        return names
    return [str((folder / name).resolve()) if isinstance(name, str) and name.endswith(".py") else name for name in names]


def sources(names: Sequence[str]) -> Iterator[Path]:
    """Yield the source files of the named and the installed plugins. A package yields all its modules.

    Other plugins may have been imported in this process; they do not belong to the caller's experiment.
    """
    load_plugins(names)
    for name in dict.fromkeys((*installed_plugins(), *names)):
        module = _LOADED[name]
        place = Path(module.__file__ or "")
        yield from sorted(place.parent.rglob("*.py")) if hasattr(module, "__path__") else [place]


@cache
def installed_plugins() -> tuple[str, ...]:
    """Return the modules of the installed plugins. Looking for them reads the metadata of every installed package."""
    return tuple(dict.fromkeys(point.module for point in entry_points(group=GROUP)))


def _load(name: str) -> None:
    if name in _LOADED:
        return
    _LOADING.append(Path(name).stem if name.endswith(".py") else name)
    try:
        _LOADED[name] = _module(name)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"plugins: {name} cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        _LOADING.pop()


def _module(name: str) -> ModuleType:
    """Import a module by its name, or from a file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    if not path.is_file():
        raise ConfigError(f"plugins: {path} is no file; give its path relative to the experiment's file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or (path.stem in sys.modules and getattr(sys.modules[path.stem], "__file__", None) != str(path)):
        raise ConfigError(f"plugins: {path.name}: a module of this name is imported already; rename the file")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def built(index: Mapping[str, type[Any]], what: str, name: str, parameters: Mapping[str, Value]) -> Any:
    """Return an entry of an index with its parameters.

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
