"""Rows of files to samples: reading, judging and, if any are bad, one error that lists them all.

A dataset's file says what its rows look like; what happens to rows that look otherwise is decided here, once.
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
"""``refuse``: one error lists all bad rows. ``skip``: they are left out, counted and listed in the report."""

T = TypeVar("T")

_SHORT = Repr()
_SHORT.maxstring = 120  # a path or an id in full, not a report
shown = _SHORT.repr
"""A value as it is spelled in Python, cut where it is long or deep."""

SURROGATE = re.compile(r"[\ud800-\udfff]")
"""Half a character: bytes that are no UTF-8 become such, and JSON can spell one out."""


class RowError(Exception):
    """A row breaks a rule; the message says which one and the value. It becomes a line of a ``DataError``."""


@dataclass(frozen=True)
class Row:
    """One record and where it stands: ``file:line``, or ``file[index]`` in a JSON list."""

    where: str
    record: Record

    def text(self, key: str) -> str:
        """Text or a whole number, with single spaces, not empty.

        Raises:
            RowError: if it is absent or something else.
        """
        words = words_of(self.value(key))
        if not words:
            raise RowError(f"{key} must be text that is not empty, got {shown(self.record[key])}")
        return words

    def choice(self, key: str, known: Mapping[str, T]) -> T:
        """What a word stands for.

        Raises:
            RowError: if the word is not among those known.
        """
        value = self.value(key)
        words = words_of(value)
        # Where the empty word stands for something, what is no text at all must not pass for it.
        if words not in known or (not words and value != ""):
            raise RowError(f"{key} must be one of {', '.join(known)}, got {shown(value)}")
        return known[words]

    def file(self, key: str, folder: Path) -> Path:
        """A file named relative to a folder, inside it.

        Raises:
            RowError: if the name leads out of the folder or no such file is there.
        """
        name = self.value(key)
        inside = f"{folder.name or folder}/"
        # Judged by its spelling: links are the user's own doing, names are the download's.
        if not isinstance(name, str) or not name or _leads_out(name) or "\0" in name:
            raise RowError(f"{key} must be a path inside {inside}, got {shown(name)}")
        if (found := next(filter(is_file, _spelled(folder, name)), None)) is None:
            raise RowError(f"{key} {shown(name)} is no file in {inside}")
        return found

    def value(self, key: str) -> Any:
        """Whatever the record holds.

        Raises:
            RowError: if it is absent, or the row could not be read.
        """
        if key not in self.record:
            raise RowError(f"lacks {key}")
        return self.record[key]


@dataclass
class Sieve:
    """Keeps the samples of good rows and remembers the bad ones.

    Attributes:
        source: what is read, for the error's first line.
        policy: what is done about bad rows.
        identity: what must occur once, of a sample.
        remedy: what to do about bad rows.
        problems: ``where: rule and value`` of each.
    """

    source: str
    policy: OnBadSample = "refuse"
    identity: Callable[[Sample], str] = attrgetter("id")
    remedy: str = "correct them or download the files again"
    problems: list[str] = field(default_factory=list)
    _places: dict[str, str] = field(default_factory=dict)
    _nothing_left: bool = False

    def samples(self, rows: Iterable[Row], convert: Callable[[Row], Sample | None]) -> list[Sample]:
        """The samples of the rows; ``convert`` raises ``RowError`` for a bad one and returns None for one to leave out."""
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
            raise RowError(f"id must occur once, {shown(name)} is also at {self._places[name]}")
        self._places[name] = where

    def finish(self) -> tuple[str, ...]:
        """Notes on what was skipped.

        Raises:
            DataError: if there are bad rows and the policy is to refuse, or skipping them left nothing of some file.
        """
        if self.problems and (self.policy == "refuse" or self._nothing_left):
            remedy = self.remedy + (", or set data.on_bad_sample to skip" if self.policy == "refuse" else "")
            left = "" if self.policy == "refuse" else ", and no other is left"
            raise DataError(f"{self.source}: {len(self.problems):,} bad row(s){left}; {remedy}:\n{listing(self.problems)}")
        return skipped(f"{len(self.problems):,} bad row(s) skipped", self.problems)


def skipped(summary: str, problems: Sequence[str]) -> tuple[str, ...]:
    """Notes for the report on what was left out: none if nothing was."""
    more = len(problems) - MAX_LISTED
    return (summary, *problems[:MAX_LISTED], *([f"... and {more:,} more"] if more > 0 else [])) if problems else ()


def _leads_out(name: str) -> bool:
    """Whether a path, written with slashes or with the backslashes of Windows, is none within a folder."""
    written = name.replace("\\", "/")
    return bool(Path(name).anchor or Path(written).anchor) or ".." in written.split("/")


def _spelled(folder: Path, name: str) -> Iterator[Path]:
    """A path as it is written; with slashes for the backslashes of Windows; with letters and their accents in one character each, or in two."""
    for written in dict.fromkeys((name, name.replace("\\", "/"))):
        yield from dict.fromkeys(folder / form for form in (written, *(unicodedata.normalize(kind, written) for kind in ("NFC", "NFD"))))


def same_form(text: str) -> str:
    """Text whose letters and accents are one character each, as far as there is one (Unicode's NFC)."""
    return unicodedata.normalize("NFC", text)


def words_of(value: object) -> str:
    """Text or a whole number as text with single spaces, accents in ``same_form``; empty for all else, half a surrogate pair (no UTF-8) included."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return ""
    try:
        text = " ".join(same_form(str(value)).split())
    except ValueError:  # a number of too many digits
        return ""
    return "" if SURROGATE.search(text) else text


def is_file(path: Path) -> bool:
    """Whether there is such a file; False too for a name that no file can have."""
    return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises for a name that is too long
