"""Indexes of everything that settings select by name, and the plugins that add to them.

A subpackage creates its index with ``index``. A plugin adds to it with ``register``, before or after the subpackage is imported. A plugin is
a module, a Python file or an entry point of the group ``fedmllm.plugins`` that registers its entries when it is imported.
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
"""The value of a hyperparameter."""
GROUP = "fedmllm.plugins"
"""The entry point group of installed plugins. Every process that reads an experiment imports them."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_INDEXES: dict[str, dict[str, Any]] = {}
_WAITING: dict[str, dict[str, Any]] = {}
"""Entries by kind and name that were registered before the index of their kind existed."""
_ORIGINS: dict[tuple[str, str], str] = {}
_LOADED: dict[str, ModuleType] = {}
_LOADING: list[str] = []
"""The plugins that are being imported, outermost first."""
_ALLOWED: list[frozenset[str]] = []
"""At a site, one set: the plugins that the site's own settings name. No others are imported there. Empty everywhere else."""


def index(kind: str, rows: dict[str, T]) -> dict[str, T]:
    """Return a subpackage's index of one kind, with the entries that plugins have registered for it.

    Raises:
        ConfigError: if a plugin has registered an entry under a name that the package uses.
    """
    waiting = _WAITING.get(kind, {})
    if taken := sorted(waiting.keys() & rows.keys()):
        raise _taken(kind, taken[0], _ORIGINS[kind, taken[0]], "fedmllm")
    rows |= waiting
    _INDEXES[kind] = rows
    return rows


def register(kind: str, name: str, thing: T, allowed: re.Pattern[str] = _NAME, rule: str = "lowercase letters, digits, _ - and .") -> T:
    """Add an entry to the index of its kind, and return the entry.

    Args:
        kind: the kind, such as ``method``. Names are unique within a kind.
        name: the name by which settings select the entry.
        thing: the entry, any object.
        allowed: the pattern of the kind's names.
        rule: the pattern in words, for the error message.

    Raises:
        ConfigError: if the name is taken or not allowed.
    """
    rows = _INDEXES[kind] if kind in _INDEXES else _WAITING.setdefault(kind, {})
    # The module of an instance is that of its class, not the module that registers it. The same origin may register a name again, such as a
    # notebook cell that runs twice.
    origin = _LOADING[-1] if _LOADING else getattr(thing, "__module__", "__main__") if callable(thing) else "__main__"
    if not allowed.fullmatch(name):
        raise ConfigError(f"plugins: {name!r} cannot name a {kind}; use {rule}")
    if name in rows and _ORIGINS.get((kind, name)) != origin:
        raise _taken(kind, name, origin, origin_of(kind, name))
    rows[name], _ORIGINS[kind, name] = thing, origin
    return thing


def _taken(kind: str, name: str, origin: str, holder: str) -> ConfigError:
    return ConfigError(f"plugins: {origin} registers {kind} {name!r}, but {holder} already has one; choose another name")


def origin_of(kind: str, name: str) -> str:
    """Return the module that registered an entry; ``fedmllm`` for an entry of the package."""
    return _ORIGINS.get((kind, name), "fedmllm")


def added(kind: str) -> dict[str, str]:
    """Return the names that plugins added to an index, each with the module that registered it."""
    return {name: origin for (of, name), origin in _ORIGINS.items() if of == kind}


def require_hyperparameters(cls: type[Any], reserved: Sequence[str]) -> None:
    """Check that the fields of a class can be hyperparameters in a settings file.

    Args:
        cls: the class of a method, a strategy or a schedule.
        reserved: class attributes that describe the class, such as ``kind``. An annotation would turn one into a field, and so into a setting.

    Raises:
        ConfigError: if the class is not a frozen dataclass, or a field has no default or the name of a reserved attribute.
    """
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ConfigError(f"plugins: {cls.__name__} must be a frozen dataclass, whose fields are its hyperparameters")
    for own in dataclasses.fields(cls):
        if own.name in reserved:
            raise ConfigError(
                f"plugins: {cls.__name__}.{own.name} describes the class and is not a hyperparameter; write it without an annotation"
            )
        if own.default is dataclasses.MISSING:
            raise ConfigError(f"plugins: {cls.__name__}.{own.name} needs a default, as every hyperparameter does")


def load_plugins(names: Sequence[str] = (), installed: bool = True) -> None:
    """Import plugins, each once per process.

    Args:
        names: importable modules, or paths of Python files, which end in ``.py``.
        installed: whether to import the plugins of installed packages too.

    Raises:
        ConfigError: if a plugin does not exist, cannot be imported, or is not allowed at this site.
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
    """Import these plugins, and refuse all others in this process from now on, including installed ones."""
    _ALLOWED[:] = [frozenset(names)]
    load_plugins(names)


def resolved(names: object, folder: Path) -> object:
    """Return a list of plugins with absolute file paths, or any other value unchanged.

    Args:
        names: the value of the setting ``plugins``, before it is checked.
        folder: the folder that relative paths start from.
    """
    if not isinstance(names, list):
        return names
    return [str((folder / name).resolve()) if isinstance(name, str) and name.endswith(".py") else name for name in names]


def sources(names: Sequence[str]) -> Iterator[Path]:
    """Yield the source files of the named and the installed plugins. A package yields all its modules.

    Other plugins that this process has imported are left out, because they do not belong to the caller's experiment.
    """
    load_plugins(names)
    for name in dict.fromkeys((*installed_plugins(), *names)):
        module = _LOADED[name]
        place = Path(module.__file__ or "")
        yield from sorted(place.parent.rglob("*.py")) if hasattr(module, "__path__") else [place]


@cache
def installed_plugins() -> tuple[str, ...]:
    """Return the modules of the installed plugins. Cached, because finding them reads the metadata of every installed package."""
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
    """Import a module by name, or from a file, and return it."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name).resolve()
    if not path.is_file():
        raise ConfigError(f"plugins: {path} is not a file; give its path relative to the experiment's file")
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
    """Return an instance of a class in an index.

    Args:
        index: dataclasses by name.
        what: what the classes are, for error messages.
        name: the name of the class.
        parameters: values of the class's fields by name. Other fields keep their defaults.

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
