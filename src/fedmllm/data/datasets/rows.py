"""Turns rows of files into samples, and reports all bad rows in one error.

A dataset's file defines its rows; this module decides what happens to rows that do not fit.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, TypeVar

from fedmllm.errors import MAX_LISTED, DataError, listing
from fedmllm.types import Record, Sample

OnBadSample = Literal["refuse", "skip"]
"""``refuse``: an error lists all bad rows. ``skip``: bad rows are left out, counted and listed in the report."""

T = TypeVar("T")

_SHORT = Repr()
_SHORT.maxstring = 120  # enough for a path or an id
shown = _SHORT.repr
"""Return the ``repr`` of a value, shortened if it is long or deeply nested."""

SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Matches surrogates, which stand for bytes that are not UTF-8 or come from JSON escapes."""


class RowError(Exception):
    """A row is invalid. The message states the rule and the value, and becomes a line of a ``DataError``."""


@dataclass(frozen=True)
class Row:
    """One record and its location: ``file:line``, or ``file[index]`` in a JSON list."""

    where: str
    record: Record

    def text(self, key: str) -> str:
        """Return a nonempty text or an integer as text with single spaces.

        Raises:
            RowError: if the value is missing, empty or of another type.
        """
        words = words_of(self.value(key))
        if not words:
            raise RowError(f"{key} must be text that is not empty, got {shown(self.record[key])}")
        return words

    def choice(self, key: str, known: Mapping[str, T]) -> T:
        """Return the entry of ``known`` that the value names.

        Raises:
            RowError: if the value is not a key of ``known``.
        """
        value = self.value(key)
        words = words_of(value)
        # If the empty text is a valid choice, values that are not text must not count as empty text.
        if words not in known or (not words and value != ""):
            raise RowError(f"{key} must be one of {', '.join(known)}, got {shown(value)}")
        return known[words]

    def file(self, key: str, folder: Path) -> Path:
        """Return the file inside a folder that the value names.

        Raises:
            RowError: if the path leads out of the folder or the file does not exist.
        """
        name = self.value(key)
        inside = f"{folder.name or folder}/"
        # Only the path's text is checked: symbolic links are created by the user, whereas names come from a download.
        if not isinstance(name, str) or not name or _leads_out(name) or "\0" in name:
            raise RowError(f"{key} must be a path inside {inside}, got {shown(name)}")
        if (found := next(filter(is_file, _spelled(folder, name)), None)) is None:
            raise RowError(f"{key} {shown(name)} is not a file in {inside}")
        return found

    def value(self, key: str) -> Any:
        """Return a value of the record.

        Raises:
            RowError: if the value is missing, or the row could not be read.
        """
        if key not in self.record:
            raise RowError(f"lacks {key}")
        return self.record[key]


@dataclass
class Sieve:
    """Collects the samples of good rows and records the problems of bad ones.

    Attributes:
        source: what is read, for the first line of the error.
        policy: whether bad rows are rejected or skipped.
        identity: returns the value of a sample that must be unique.
        remedy: what the user can do about bad rows.
        problems: for each bad row, ``where: rule and value``.
    """

    source: str
    policy: OnBadSample = "refuse"
    identity: Callable[[Sample], str] = attrgetter("id")
    remedy: str = "correct them or download the files again"
    problems: list[str] = field(default_factory=list)
    _places: dict[str, str] = field(default_factory=dict)
    _nothing_left: bool = False

    def samples(self, rows: Iterable[Row], convert: Callable[[Row], Sample | None]) -> list[Sample]:
        """Return the samples of the rows. ``convert`` raises ``RowError`` for a bad row, and returns None for a row to leave out."""
        before = len(self.problems)
        kept = [sample for row in rows if (sample := self._sample(row, convert)) is not None]
        self._nothing_left |= not kept and len(self.problems) > before
        return kept

    def _sample(self, row: Row, convert: Callable[[Row], Sample | None]) -> Sample | None:
        try:
            sample = convert(row)
            if sample is not None:
                self._once(self.identity(sample), row.where)
        except RowError as problem:
            self.problems.append(f"{row.where}: {problem}")
            return None
        return sample

    def _once(self, name: str, where: str) -> None:
        if name in self._places:
            raise RowError(f"id must be unique, but {shown(name)} also occurs at {self._places[name]}")
        self._places[name] = where

    def finish(self) -> tuple[str, ...]:
        """Return notes on the rows that were skipped.

        Raises:
            DataError: if there are bad rows and the policy is to refuse, or if skipping them left no row of some file.
        """
        if self.problems and (self.policy == "refuse" or self._nothing_left):
            remedy = self.remedy + (", or set data.on_bad_sample to skip" if self.policy == "refuse" else "")
            left = "" if self.policy == "refuse" else ", and no other rows are left"
            raise DataError(f"{self.source}: {len(self.problems):,} bad row(s){left}; {remedy}:\n{listing(self.problems)}")
        return skipped(f"{len(self.problems):,} bad row(s) skipped", self.problems)


def skipped(summary: str, problems: Sequence[str]) -> tuple[str, ...]:
    """Return notes for the report on what was left out; empty if nothing was."""
    more = len(problems) - MAX_LISTED
    return (summary, *problems[:MAX_LISTED], *([f"... and {more:,} more"] if more > 0 else [])) if problems else ()


def _leads_out(name: str) -> bool:
    """Return whether a path, written with slashes or Windows backslashes, is absolute or leads out of its folder."""
    written = name.replace("\\", "/")
    return bool(Path(name).anchor or Path(written).anchor) or ".." in written.split("/")


def _spelled(folder: Path, name: str) -> Iterator[Path]:
    """Yield the spellings of a path to try: as written, with slashes instead of backslashes, and in the Unicode forms NFC and NFD."""
    for written in dict.fromkeys((name, name.replace("\\", "/"))):
        yield from dict.fromkeys(folder / form for form in (written, *(unicodedata.normalize(kind, written) for kind in ("NFC", "NFD"))))


def same_form(text: str) -> str:
    """Return text in the Unicode form NFC, in which a letter and its accent are one character if possible."""
    return unicodedata.normalize("NFC", text)


def words_of(value: object) -> str:
    """Return text or an integer as text in ``same_form`` with single spaces. All other values, and text with surrogates, give empty text."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ""
    try:
        text = " ".join(same_form(str(value)).split())
    except ValueError:  # a number with too many digits
        return ""
    return "" if SURROGATE.search(text) else text


def is_file(path: Path) -> bool:
    """Return whether the file exists; False also for names that no file can have."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long
