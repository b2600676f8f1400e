"""Checkpoints in a run folder: server states, replaced atomically, and one line of metrics per round."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fedmllm.algorithms import Outstanding, ServerState
from fedmllm.errors import RunError
from fedmllm.files import write_atomically, written
from fedmllm.packing import pack, unpack
from fedmllm.types import Record, Slots, Weights

_EARLIER = "earlier."
"""Prefix, before the round number, of weights that outstanding clients train from."""


@dataclass(frozen=True)
class RunStore:
    """Checkpoints and metrics of one run folder."""

    folder: Path

    @property
    def metrics_file(self) -> Path:
        """Path of ``metrics.jsonl``, with one JSON line per finished round of any stage."""
        return self.folder / "metrics.jsonl"

    def save_state(self, stage: str, state: ServerState) -> None:
        """Replace a stage's checkpoint."""
        accepted = {client: list(rounds) for client, rounds in state.accepted.items()}
        left = state.outstanding
        facts = {"round_num": state.round_num, "accepted": accepted, "clock": left.clock, "earlier": list(left.weights)}
        facts |= {"outstanding": [[name, *at] for name, at in left.clients.items()]}
        # Tensors that have not changed since an earlier round are written only once.
        earlier = {
            f"{_EARLIER}{number}": {name: t.clone() for name, t in weights.items() if t is not state.weights[name]}
            for number, weights in left.weights.items()
        }
        content = pack({"weights": state.weights, **state.slots, **earlier}, facts)
        write_atomically(self._state_file(stage), content)

    def load_state(self, stage: str) -> ServerState | None:
        """Return a stage's last checkpoint, or None if it has none.

        Raises:
            RunError: if the file is damaged, or does not record whose updates were accepted.
        """
        path, remedy = self._state_file(stage), "delete it to train this stage from the start"
        if not path.is_file():
            return None
        groups, facts = read_checkpoint(path, remedy)
        if "accepted" not in facts:
            raise RunError(f"{path}: written by an older version that did not record whose updates were accepted; {remedy}")
        weights = groups.pop("weights")
        earlier = {number: {**weights, **groups.pop(f"{_EARLIER}{number}", {})} for number in facts.get("earlier", [])}
        clients = {name: (int(number), float(done)) for name, number, done in facts.get("outstanding", [])}
        left = Outstanding(clients, earlier, facts.get("clock", 0.0))
        return ServerState(weights, facts["round_num"], groups, accepted=facts["accepted"], outstanding=left)

    def client_states(self, stage: str) -> ClientStates:
        """Return the store of what each client of a stage keeps between rounds."""
        return ClientStates(self.folder / "checkpoints" / f"{stage}-clients")

    def append(self, record: Mapping[str, object]) -> None:
        """Append a round's record to ``metrics.jsonl``."""
        with written(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self, stage: str | None = None) -> list[Record]:
        """Return a stage's records, or those of all stages, in the order of the file, without a truncated last line."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            records = [json.loads(line) for line in lines if line.endswith("\n")]
        except json.JSONDecodeError as error:
            raise RunError(f"{self.metrics_file}: a line is not JSON ({error}); start the run again in another folder") from error
        return [record for record in records if stage is None or record["stage"] == stage]

    def rewind(self, stage: str, round_num: int) -> None:
        """Remove a stage's records after a round. A crash may leave a round's record without its checkpoint."""
        kept = [record for record in self.records() if record["stage"] != stage or record["round"] <= round_num]
        write_atomically(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def _state_file(self, stage: str) -> Path:
        return self.folder / "checkpoints" / f"{stage}.safetensors"


class BackgroundCheckpoint:
    """Writes a stage's states in the background while the next round trains, one at a time. Leaving the ``with`` block waits for the last write.

    Args:
        store: the run's store.
        stage: the stage's name.
        durable: whether ``save`` waits until the state is on the disk.
    """

    def __init__(self, store: RunStore, stage: str, durable: bool = False) -> None:
        self._store, self._stage, self._durable = store, stage, durable
        self._pool, self._writing = ThreadPoolExecutor(1, "checkpoint"), Future[None]()
        self._writing.set_result(None)

    def save(self, state: ServerState) -> None:
        """Start to replace the checkpoint after the previous write has finished. Raises the previous write's error, if any."""
        self._writing.result()
        self._writing = self._pool.submit(self._store.save_state, self._stage, state)
        if self._durable:
            self._writing.result()

    def __enter__(self) -> BackgroundCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._writing.result()


@dataclass(frozen=True)
class ClientStates:
    """What clients keep between rounds, on disk, in one file per client and round.

    A file is pending until a later task says that the server accepted the round's update. When the client writes the file, it cannot know: the
    server may refuse the update, lose it, or stop waiting for it. Rounds are counted from 0.
    """

    folder: Path

    def load(self, client: str, accepted: Sequence[int]) -> Slots:
        """Return what a client kept from its last accepted round; empty if there is no such round or it kept nothing.

        Raises:
            RunError: if the file is damaged.
        """
        if not accepted or not (path := self._file(client, accepted[-1])).is_file():
            return {}
        return read_checkpoint(path, "start the run again in another folder")[0]

    def save(self, client: str, round_num: int, slots: Slots, accepted: Sequence[int]) -> None:
        """Save what a client keeps from a round, and delete older files except those of accepted rounds.

        Files of two accepted rounds are needed. After a crash the last two rounds may be trained again: the interrupted one, and the one whose
        checkpoint was still being written.
        """
        write_atomically(self._file(client, round_num), pack(slots, {"round_num": round_num}))
        for number in self._rounds(client):
            if number < round_num and number not in accepted:
                self._file(client, number).unlink(missing_ok=True)

    def _rounds(self, client: str) -> list[int]:
        return sorted(int(path.stem) for path in (self.folder / client).glob("*.safetensors") if path.stem.isdigit())

    def _file(self, client: str, round_num: int) -> Path:
        return self.folder / client / f"{round_num}.safetensors"


def read_checkpoint(path: Path, remedy: str) -> tuple[dict[str, Weights], Record]:
    """Read a checkpoint.

    Returns:
        The tensors by group, and the file's metadata with at least ``round_num``.

    Raises:
        RunError: if the file is damaged.
    """
    try:
        groups, facts = unpack(path.read_bytes())
        return groups, {**facts, "round_num": int(facts["round_num"])}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged checkpoint ({error}); {remedy}") from error
