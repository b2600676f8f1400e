"""Cache keys of prompts and folders. They are computed from content and not from the settings that produced it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from fedmllm.types import Content, EditedImage, Message


def prompt_key(messages: Sequence[Message], answer: str) -> bytes:
    """Return a 16-byte key of a prompt, its content and its answer.

    A file is identified by path, size and modification time, so that it need not be read. Bytes and images in memory are hashed. An edited
    image is identified by its source and all edits, including their seeds.
    """
    digest = hashlib.blake2b(digest_size=16)
    parts = [(message.role, part.type, _content_key(part.value)) for message in messages for part in message.parts]
    digest.update(repr((parts, answer)).encode())
    return digest.digest()


def _content_key(value: Content) -> object:
    """Return an object whose ``repr`` identifies the content."""
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
    """Return bytes that identify an image in memory: its mode, size, palette, transparency and pixels."""
    kind = f"{picture.mode} {picture.size} {picture.getpalette('RGBA')} {picture.info.get('transparency')}"
    return kind.encode() + (picture.tobytes() if all(picture.size) else b"")


def _state(path: Path) -> tuple[int, int] | None:
    """Return size and modification time; None for a missing file, which raises an error only when it is read."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def folder_key(*folders: Path) -> str:
    """Return a hash of files, or of all files in folders, by path, size and modification time. A missing folder counts as empty.

    Hidden files and the folders of runs and sweeps are ignored, because they change while data and models stay the same.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in _files(folder):
            digest.update(repr((str(path), _state(path))).encode())
    return digest.hexdigest()


_ROWS = frozenset((".json", ".jsonl", ".csv", ".tsv", ".txt", ".arrow", ".parquet", ".yaml"))


def content_key(*folders: Path) -> str:
    """Return a hash of files, or of all files in folders, that is the same on every machine; empty if none are given.

    Files with rows or settings are hashed by content; all others, such as images and weights, by name and size.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in _files(folder):
            digest.update(repr((path.relative_to(folder).as_posix(), path.stat().st_size)).encode())
            if path.suffix.lower() in _ROWS:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if folders else ""


def _files(folder: Path) -> Iterator[Path]:
    """Yield a folder's files in sorted order, following links and visiting each folder once. A file yields itself."""
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
