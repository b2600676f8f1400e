"""Helpers for files and folders."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedmllm.errors import RunError

_POINTER = b"version https://git-lfs"


def is_pointer(path: Path) -> bool:
    """Return whether a file is a git-lfs pointer, which stands for content that was not downloaded."""
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def require_folder(folder: Path) -> None:
    """Check that a folder exists or can be created, and is writable, before any work is done.

    Raises:
        RunError: if not; the message names the path that prevents it.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise RunError(
            f"{folder}: cannot be a folder, because {nearest} is {'a file' if nearest.exists() else 'a broken link'}; choose another folder"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"{folder}: cannot be written, because {nearest} is not writable; choose another folder, or make it writable")


def require_new_folder(folder: Path) -> None:
    """Check that a folder does not exist and can be created.

    Raises:
        RunError: if it exists or cannot be created.
    """
    if folder.exists():
        raise RunError(f"{folder}: already exists; choose a new folder")
    require_folder(folder)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Make system errors raised while writing in this block name the path, including those that safetensors wraps.

    Raises:
        OSError: the system's error, with ``filename`` set.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def write_atomically(path: Path, content: bytes, new: bool = False) -> None:
    """Write a file atomically: readers find either the old content or the new content, even after a crash.

    Args:
        path: the file.
        content: its new content.
        new: whether the file must not exist yet. If several processes write it at once, exactly one succeeds.

    Raises:
        FileExistsError: if ``new`` is set and the file exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.draft" if new else f".{path.name}.draft")
    with written(path), draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if new:
        _rename_once(draft, path)
    else:
        draft.replace(path)


def _rename_once(draft: Path, path: Path) -> None:
    """Rename a file unless the target exists. A hard link does both in one operation, if the file system supports hard links."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:
        path.open("xb").close()
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names of new files in a folder durable, which syncing the files alone does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write an indented JSON file atomically. NaN and infinity raise a ValueError, because JSON has no such values."""
    write_atomically(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
