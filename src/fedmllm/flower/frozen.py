"""Keeps remote workers up to date with the change that a method merges into the frozen weights.

A worker receives the factors of each round's change that it does not have. It receives full-size matrices only if they are smaller than all the
missing factors, or if the factors are no longer available.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.engine.checkpoint import read_checkpoint
from fedmllm.errors import RunError
from fedmllm.files import write_atomically
from fedmllm.packing import pack
from fedmllm.types import Broadcast, Weights


@dataclass(frozen=True)
class Missing:
    """The part of the change to the frozen weights that a client does not have.

    Attributes:
        since: the client has the change up to the start of this round; None if the server sends the complete change.
        steps: factors of the change in each later round, by the round at whose start they are merged.
        whole: the complete change by module, as full-size matrices; empty if the server sends factors.
        session: the server's session. A resumed run may repeat rounds, whose change may then differ from an earlier session's.
    """

    since: int | None = 0
    steps: Mapping[int, Weights] = field(default_factory=dict)
    whole: Weights = field(default_factory=dict)
    session: str = "0" * 8


@dataclass(frozen=True)
class BaseHistory:
    """The server's record of the change to the frozen weights.

    Attributes:
        folder: holds the factors of every round, in the run folder.
        last: the last round whose change each client is known to have, in this session.
        session: a random id of this session.
    """

    folder: Path
    last: dict[str, int] = field(default_factory=dict)
    session: str = field(default_factory=lambda: secrets.token_hex(4))

    def note(self, broadcast: Broadcast) -> None:
        """Store the factors of the last round's change. A skipped round has none, and the file records that."""
        if broadcast.base:
            write_atomically(self._file(broadcast.round_num), pack({"step": broadcast.base_step}, {"round_num": broadcast.round_num}))

    def missing(self, client: str, broadcast: Broadcast) -> Missing:
        """Return what a client does not have. A client that has not answered yet has only what every run starts with."""
        if not broadcast.base:
            return Missing(session=self.session)
        since = self.last.get(client, 0)
        files = {number: self._file(number) for number in range(since + 1, broadcast.round_num + 1)}
        if all(file.is_file() for file in files.values()):
            steps = {number: _read(file).get("step", {}) for number, file in files.items()}
            if W.num_bytes(*steps.values()) <= W.num_bytes(broadcast.base):
                return Missing(since, steps, session=self.session)
        return Missing(None, whole=broadcast.base, session=self.session)

    def answered(self, client: str, broadcast: Broadcast, failed: bool = False) -> None:
        """Record that a client has what it received. A client that failed may have lost it, so it starts from the beginning again."""
        self.last[client] = broadcast.round_num if broadcast.base and not failed else 0

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"


@dataclass(frozen=True)
class KeptBase:
    """The worker's copy of the change to the frozen weights, on disk, so that a restarted worker does not need all of it again.

    Several workers on one machine may share it.
    """

    folder: Path

    def brought_up(self, missing: Missing, round_num: int, first: Weights) -> Weights:
        """Return the change to the frozen weights at the start of a round, bit-identical to the server's.

        Args:
            missing: what the server sent.
            round_num: the round.
            first: the change that every run starts with.

        Raises:
            RunError: if the stored change that ``missing`` continues is gone; the server then sends the complete change.
        """
        if missing.since is None:
            base = missing.whole
        else:
            found, base = self._newest(missing, round_num, first)
            for number in range(found + 1, round_num + 1):
                if step := missing.steps.get(number):
                    base = factors.accumulated(base, step)
        if base and round_num:
            self._keep(base, round_num, missing.session)
        return base

    def _newest(self, missing: Missing, last: int, first: Weights) -> tuple[int, Weights]:
        """Return the newest usable round and its stored change."""
        since, files = missing.since or 0, self._files(missing.session)
        if (found := max((number for number in files if since <= number <= last), default=None)) is not None:
            return found, _read(files[found])["base"]
        if since == 0:
            return 0, first
        raise RunError(
            f"the change to the frozen weights up to round {since} is no longer stored here; the server sends it with the next task"
        )

    def _keep(self, base: Weights, round_num: int, session: str) -> None:
        """Store a round's change in a file of this process. The file of the previous round stays for workers that have not reached this round."""
        files = self._files(session)
        if round_num not in files:
            path = self.folder / f"{round_num}-{session}-{os.getpid()}.safetensors"
            write_atomically(path, pack({"base": base}, {"round_num": round_num}))
        needed = {path for number, path in files.items() if number >= round_num - 1}
        for path in self.folder.glob("*.safetensors"):
            if path not in needed and not path.name.startswith(f"{round_num}-{session}-"):
                path.unlink(missing_ok=True)

    def _files(self, session: str) -> dict[int, Path]:
        return {int(path.name.partition("-")[0]): path for path in self.folder.glob(f"*-{session}-*.safetensors")}


def _read(path: Path) -> dict[str, Weights]:
    return read_checkpoint(path, "delete it, and the server sends its content again")[0]
