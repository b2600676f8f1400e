"""The durable record of privacy that was spent. A release is written to it before anything is released.

If a process dies between the two, the release counts as spent although nobody saw it. The opposite order could release twice and count
once. Resuming a run never removes lines.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fedmllm.errors import RunError
from fedmllm.files import sync_folder, written
from fedmllm.privacy.accounting import Releases
from fedmllm.types import Record

LEDGER = "privacy.jsonl"
"""Name of the ledger in the folder of a run or of a site."""


class Ledger:
    """A file with one JSON line per release: the fields of ``Releases``, and what the caller adds to identify it.

    Several processes may use one ledger. Each line is on the disk when ``spend`` returns.

    Args:
        path: the file, e.g. ``privacy.jsonl`` in the run folder. It is created by the first ``spend``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[Record] = []
        self._offset = 0

    def spend(self, releases: Releases, **about: str | int | list[str]) -> None:
        """Record a release that is about to happen.

        Args:
            releases: what will be released.
            about: what identifies it, e.g. run, stage and round.

        Raises:
            OSError: if it cannot be written; then nothing may be released.
        """
        line = {"noise_multiplier": releases.noise_multiplier, "count": releases.count, "rate": releases.rate, **about}
        with written(self.path), self._locked() as file:
            # A line that a crash cut off would otherwise swallow this one.
            file.write(("" if _complete(file) else "\n") + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[Record]:
        """Return all lines.

        Raises:
            RunError: if a line is not a release. It would be wrong to count it as nothing.
        """
        if not self.path.exists():
            return []
        # Lines are only ever appended, so that those that were read need not be read again.
        with self.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            file.seek(self._offset)
            added = file.read()
        first = len(self._lines) + 1
        found = [self._read(number, text) for number, text in enumerate(added.decode("utf-8").splitlines(), first) if text]
        if added.endswith(b"\n"):
            self._lines, self._offset = [*self._lines, *found], self._offset + len(added)
            return list(self._lines)
        return [*self._lines, *found]

    def releases(self, client: str | None = None) -> list[Releases]:
        """Return everything that was spent, or what one client spent.

        Args:
            client: the client's name, if lines name the client that they belong to; None for all lines.

        Raises:
            RunError: if a line is not a release.
        """
        lines = [line for line in self.lines() if client is None or line["client"] == client]
        return [Releases(line["noise_multiplier"], line["count"], line["rate"]) for line in lines]

    def _read(self, number: int, text: str) -> Record:
        try:
            line = dict(json.loads(text))
            Releases(line["noise_multiplier"], line["count"], line["rate"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.path}:{number}: not a line of a privacy ledger ({error}); if a crash cut it off, nothing was released for it and the line "
                "can be removed, else restore the file"
            ) from error
        return line

    @contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        """Yield the file, open for appending, while no other process appends."""
        created = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if created:
                sync_folder(self.path.parent)
            yield file


def _complete(file: IO[str]) -> bool:
    """Return whether a file is empty or ends with a line break."""
    size = os.fstat(file.fileno()).st_size
    return size == 0 or os.pread(file.fileno(), 1, size - 1) == b"\n"
