"""How workers elsewhere keep up with what a method merges into the frozen weights: by the factors of each round's part, as far as they lack them.

Matrices of full size are sent only where they are smaller than all the factors that are missing, or where those are not known any more.
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
    """What a client is sent of the change to the frozen weights.

    Attributes:
        since: the round at whose start it has the rest; None if it is sent all of it.
        steps: factors of what was merged after that, by the round at whose start it is there.
        whole: by module, of full size; empty unless all of it is sent.
        sitting: of the server. What was merged in an earlier one may have come to something else.
    """

    since: int | None = 0
    steps: Mapping[int, Weights] = field(default_factory=dict)
    whole: Weights = field(default_factory=dict)
    sitting: str = "0" * 8


@dataclass(frozen=True)
class BaseHistory:
    """The server's side.

    Attributes:
        folder: of the run, for the factors of every round.
        last: the round that each client is known to have been brought up to in this sitting.
        sitting: a name for it.
    """

    folder: Path
    last: dict[str, int] = field(default_factory=dict)
    sitting: str = field(default_factory=lambda: secrets.token_hex(4))

    def note(self, broadcast: Broadcast) -> None:
        """Keep the factors of the last round's part; of a round that was skipped there are none, which is kept too."""
        if broadcast.base:
            write_atomically(self._file(broadcast.round_num), pack({"step": broadcast.base_step}, {"round_num": broadcast.round_num}))

    def missing(self, client: str, broadcast: Broadcast) -> Missing:
        """What a client lacks. One that has not answered yet has what every run begins with."""
        if not broadcast.base:
            return Missing(sitting=self.sitting)
        since = self.last.get(client, 0)
        files = {number: self._file(number) for number in range(since + 1, broadcast.round_num + 1)}
        if all(file.is_file() for file in files.values()):
            steps = {number: _read(file).get("step", {}) for number, file in files.items()}
            if W.num_bytes(*steps.values()) <= W.num_bytes(broadcast.base):
                return Missing(since, steps, sitting=self.sitting)
        return Missing(None, whole=broadcast.base, sitting=self.sitting)

    def answered(self, client: str, broadcast: Broadcast, failed: bool = False) -> None:
        """A client has what it was sent, unless it says that something failed there: then it may have lost what it had."""
        self.last[client] = broadcast.round_num if broadcast.base and not failed else 0

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"


@dataclass(frozen=True)
class KeptBase:
    """The worker's side: what the frozen weights have gained, on disk, so that a worker that is started anew need not be sent all of it.

    Several workers of one machine may share it.
    """

    folder: Path

    def brought_up(self, missing: Missing, round_num: int, first: Weights) -> Weights:
        """What the frozen weights have gained at the start of a round, bit for bit as at the server.

        Args:
            missing: what was sent of it.
            round_num: the round.
            first: what every run begins with.

        Raises:
            RunError: if what it goes on from is not here; the server then sends all.
        """
        if missing.since is None:
            base = missing.whole
        else:
            found, base = self._newest(missing, round_num, first)
            for number in range(found + 1, round_num + 1):
                if step := missing.steps.get(number):
                    base = factors.accumulated(base, step)
        if base and round_num:
            self._keep(base, round_num, missing.sitting)
        return base

    def _newest(self, missing: Missing, last: int, first: Weights) -> tuple[int, Weights]:
        """What is here, and of which round."""
        since, files = missing.since or 0, self._files(missing.sitting)
        if (found := max((number for number in files if since <= number <= last), default=None)) is not None:
            return found, _read(files[found])["base"]
        if since == 0:
            return 0, first
        raise RunError(f"what the frozen weights had gained by round {since} is not here any more; the server sends it with the next task")

    def _keep(self, base: Weights, round_num: int, sitting: str) -> None:
        """In a file of this process's own; that of the round before stays for workers that are not there yet."""
        files = self._files(sitting)
        if round_num not in files:
            path = self.folder / f"{round_num}-{sitting}-{os.getpid()}.safetensors"
            write_atomically(path, pack({"base": base}, {"round_num": round_num}))
        needed = {path for number, path in files.items() if number >= round_num - 1}
        for path in self.folder.glob("*.safetensors"):
            if path not in needed and not path.name.startswith(f"{round_num}-{sitting}-"):
                path.unlink(missing_ok=True)

    def _files(self, sitting: str) -> dict[int, Path]:
        return {int(path.name.partition("-")[0]): path for path in self.folder.glob(f"*-{sitting}-*.safetensors")}


def _read(path: Path) -> dict[str, Weights]:
    return read_checkpoint(path, "delete it, and what it held is sent anew")[0]
