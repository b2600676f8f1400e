"""Files and folders, whatever is in them."""

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
    """Whether a file is what git-lfs leaves where the content was not downloaded: a few lines that name it."""
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for a name that is too long
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def require_folder(folder: Path) -> None:
    """Refuse a folder that is none or cannot be made, before any work is done for it.

    Raises:
        RunError: naming what is in the way.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise RunError(
            f"{folder}: cannot be a folder, since {nearest} is {'a file' if nearest.exists() else 'a broken link'}; choose another"
        )
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError(f"{folder}: cannot be written, since {nearest} may not be; choose another folder, or allow writing there")


def require_new_folder(folder: Path) -> None:
    """The same of a folder that must not exist.

    Raises:
        RunError: if it does, or cannot be made.
    """
    if folder.exists():
        raise RunError(f"{folder}: exists already; choose a new folder")
    require_folder(folder)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """In this block a file or folder is written: an error of the system names it, also one that safetensors puts in words of its own.

    Raises:
        OSError: as the system gave it, with ``filename``.
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
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part.

    Args:
        path: where.
        content: what.
        new: that nobody else may have written; of several processes at once, one does.

    Raises:
        FileExistsError: if it is to be new and is not.
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
    """Give a file its name, unless another has it: a link does both at once where the file system has links."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:
        path.open("xb").close()
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write an indented JSON file atomically. NaN and infinity are refused: they are not JSON."""
    write_atomically(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
