"""Files and folders, whatever is in them."""

from __future__ import annotations

from pathlib import Path

_POINTER = b"version https://git-lfs"


def is_pointer(path: Path) -> bool:
    """Whether a file is what git-lfs leaves where the content was not downloaded: a few lines that name it."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER
