"""The rounds for which a site has masked a vector, on disk: there is one masked vector for each round, ever.

Two vectors of one round with different masks would let a server subtract two sums that differ in one client.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from fedmllm.errors import FederationError, RunError
from fedmllm.files import sync_folder, written
from fedmllm.privacy.secagg.messages import RoundId


class Used(Protocol):
    """The rounds that were used."""

    def require_unused(self, round_id: RoundId) -> None:
        """Raise a ``FederationError`` if a round was used."""
        ...

    def claim(self, round_id: RoundId) -> None:
        """Mark a round as used before its vector is masked. Raises a ``FederationError`` if it was used before."""
        ...


class UsedRounds:
    """A file with one JSON line per round. Several processes may use one file. Each line is on the disk when ``claim`` returns.

    Args:
        path: the file. It is created by the first ``claim``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def require_unused(self, round_id: RoundId) -> None:
        """Check that a round was not used.

        Raises:
            FederationError: if it was.
            RunError: if the file is damaged.
        """
        if self.path.exists():
            refuse_if(self._line(round_id) in self._lines(self.path.read_bytes()), round_id)

    def claim(self, round_id: RoundId) -> None:
        """Mark a round as used.

        Raises:
            FederationError: if it was used before.
            RunError: if the file is damaged.
            OSError: if it cannot be written; then nothing may be masked.
        """
        line = self._line(round_id)
        with written(self.path), self._locked() as file:
            content = file.read()
            complete = content[: content.rfind(b"\n") + 1]
            refuse_if(line in self._lines(complete), round_id)
            # A crash cut the rest off before its claim returned, so nothing was masked for it.
            file.truncate(len(complete))
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _line(self, round_id: RoundId) -> bytes:
        return json.dumps({"run": round_id.run, "stage": round_id.stage, "round": round_id.round_num}).encode()

    def _lines(self, content: bytes) -> set[bytes]:
        """Return the complete lines."""
        lines = content.split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            if not _is_round(line):
                raise RunError(
                    f"{self.path}:{number}: not a line of a list of used rounds; restore the file; without it, only runs with new names are safe"
                )
        return set(lines)

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """Yield the file, open at its start, while no other process uses it. Writes go to its end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            sync_folder(self.path.parent)
            file.seek(0)
            yield file


def refuse_if(used: bool, round_id: RoundId) -> None:
    """Raise a ``FederationError`` if a round was used."""
    if used:
        raise FederationError(
            f"a client masks one vector for each round, and did so for {round_id}; the round must be skipped, because a second vector would let the "
            "server take the difference of two sums"
        )


def _is_round(line: bytes) -> bool:
    try:
        return isinstance(found := json.loads(line), dict) and found.keys() == {"run", "stage", "round"}
    except ValueError:
        return False
