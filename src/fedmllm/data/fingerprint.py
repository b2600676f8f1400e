"""Keys of what is kept between runs: what a prompt and a folder are made of, rather than which settings led to them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from fedmllm.types import Content, EditedImage, Message


def prompt_key(messages: Sequence[Message], answer: str) -> bytes:
    """16 bytes that differ wherever a prompt, anything it shows or its answer does.

    A file stands for its content by path, size and time of change, so that nothing is read; bytes and pictures in memory by
    themselves; an edited picture by what is edited and all edits, their seeds included.
    """
    digest = hashlib.blake2b(digest_size=16)
    parts = [(message.role, part.type, _content_key(part.value)) for message in messages for part in message.parts]
    digest.update(repr((parts, answer)).encode())
    return digest.digest()


def _content_key(value: Content) -> object:
    """Something whose ``repr`` differs wherever the content does."""
    if isinstance(value, EditedImage):
        return _content_key(value.source), value.edits
    if isinstance(value, Path):
        return "file", str(value), _state(value)
    if isinstance(value, bytes):
        return hashlib.blake2b(value, digest_size=16).digest()
    if isinstance(value, Image.Image):
        return hashlib.blake2b(picture_bytes(value), digest_size=16).digest()
    return value


def picture_bytes(picture: Image.Image) -> bytes:
    """Bytes that differ wherever two pictures in memory do: format, size, palette, transparency and pixels."""
    kind = f"{picture.mode} {picture.size} {picture.getpalette('RGBA')} {picture.info.get('transparency')}"
    return kind.encode() + (picture.tobytes() if all(picture.size) else b"")


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of change; None for a file that is not there, which is an error for whoever reads it."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def folder_key(*folders: Path) -> str:
    """A digest of the files in some folders, or of some files, by path, size and time of change; of empty folders where one is not there.

    Hidden files, and the folders of runs and sweeps, which change while data and models stay as they are, do not count.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in _files(folder):
            digest.update(repr((str(path), _state(path))).encode())
    return digest.hexdigest()


_ROWS = frozenset((".json", ".jsonl", ".csv", ".tsv", ".txt", ".arrow", ".parquet", ".yaml"))


def content_key(*folders: Path) -> str:
    """A digest of some folders, or files, that is the same on every machine: files that hold rows or settings by their content, all others, such as
    pictures and weights, by name and size. Empty for none."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in _files(folder):
            digest.update(repr((path.relative_to(folder).as_posix(), path.stat().st_size)).encode())
            if path.suffix.lower() in _ROWS:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if folders else ""


def _files(folder: Path) -> Iterator[Path]:
    """In sorted order, links followed, each folder once; a file is itself."""
    if folder.is_file():
        yield folder
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        found = os.stat(place)  # noqa: PTH116 - os.walk gives text
        written = "grid.json" in names or {"config.yaml", "manifest.json"} <= set(names)
        if written or (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))
