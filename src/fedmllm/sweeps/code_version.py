"""Digests of the code that results depend on, by which a sweep knows its finished cells."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

import fedmllm
from fedmllm.models.source import NANO_FOLDER
from fedmllm.registry import sources

_RUN = "fedmllm.run.train"
"""The module that trains a cell."""

_WITHOUT_EFFECT = frozenset(
    {"fedmllm.engine.observer", "fedmllm.format", *(f"fedmllm.run.{name}" for name in ("card", "folders", "roll_call", "tracking"))}
    | {f"fedmllm.flower.{name}" for name in ("installed", "run_grid", "settings", "simulation", "superlink")}
)
"""Modules that a run imports only to show its numbers or to reach its clients. They do not affect results."""


@cache
def code_version() -> str:
    """Return a digest of the code that a run imports, without comments and docstrings, and of the embedded model.

    Scores depend on these, on settings and on data.
    """
    digest = hashlib.sha256()
    for path in code_files():
        digest.update(_meaning(path.read_text(encoding="utf-8")).encode())
    for path in sorted(path for path in NANO_FOLDER.iterdir() if path.suffix != ".md"):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@cache
def plugin_version(plugins: tuple[str, ...]) -> str:
    """A digest of the plugins' code, installed ones included, as in ``code_version``; empty without any."""
    meanings = [_meaning(path.read_text(encoding="utf-8")) for path in sources(plugins)]
    return hashlib.sha256("".join(meanings).encode()).hexdigest()[:12] if meanings else ""


def code_files() -> list[Path]:
    """Return the package's modules that a run imports, directly or indirectly, and all dataset modules, which are imported by name."""
    package = Path(fedmllm.__file__).parent
    found: set[Path] = set()
    waiting = [_module_file(_RUN), *sorted((package / "data" / "datasets").rglob("*.py"))]
    while waiting:
        path = waiting.pop()
        if path is not None and path not in found:
            found.add(path)
            waiting += [_module_file(name) for name in sorted(_imported(path))]
    return sorted(found)


def _imported(path: Path) -> set[str]:
    """Return the names that a module imports from this package, also inside functions. They include names that are not modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.startswith("fedmllm.") and name not in _WITHOUT_EFFECT}


def _module_file(name: str) -> Path | None:
    """Return the file of a module; None for a name that is not a module."""
    place = Path(fedmllm.__file__).parent.joinpath(*name.split(".")[1:])
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _meaning(source: str) -> str:
    """Return a module's syntax tree as text, without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [
                n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str))
            ]
            node.body = kept  # type: ignore[attr-defined]
    return ast.dump(tree)
