"""What a run folder remembers: server states, replaced atomically, and one line of metrics per round."""

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
"""Before the round of weights that outstanding clients train from."""


@dataclass(frozen=True)
class RunStore:
    """Checkpoints and metrics of one run folder."""

    folder: Path

    @property
    def metrics_file(self) -> Path:
        """One JSON line per finished round of any stage."""
        return self.folder / "metrics.jsonl"

    def save_state(self, stage: str, state: ServerState) -> None:
        """Replace a stage's checkpoint."""
        accepted = {client: list(rounds) for client, rounds in state.accepted.items()}
        left = state.outstanding
        facts = {"round_num": state.round_num, "accepted": accepted, "clock": left.clock, "earlier": list(left.weights)}
        facts |= {"outstanding": [[name, *at] for name, at in left.clients.items()]}
        # What has not changed since is not written twice.
        earlier = {
            f"{_EARLIER}{number}": {name: t.clone() for name, t in weights.items() if t is not state.weights[name]}
            for number, weights in left.weights.items()
        }
        content = pack({"weights": state.weights, **state.slots, **earlier}, facts)
        write_atomically(self._state_file(stage), content)

    def load_state(self, stage: str) -> ServerState | None:
        """A stage's last checkpoint; None if it has none.

        Raises:
            RunError: if the file is damaged, or does not say whose updates were accepted.
        """
        path, remedy = self._state_file(stage), "delete it to train this stage anew"
        if not path.is_file():
            return None
        groups, facts = read_checkpoint(path, remedy)
        if "accepted" not in facts:
            raise RunError(f"{path}: an older version wrote it, which did not note whose updates were accepted; {remedy}")
        weights = groups.pop("weights")
        earlier = {number: {**weights, **groups.pop(f"{_EARLIER}{number}", {})} for number in facts.get("earlier", [])}
        clients = {name: (int(number), float(done)) for name, number, done in facts.get("outstanding", [])}
        left = Outstanding(clients, earlier, facts.get("clock", 0.0))
        return ServerState(weights, facts["round_num"], groups, accepted=facts["accepted"], outstanding=left)

    def client_states(self, stage: str) -> ClientStates:
        """What the clients of a stage keep for themselves."""
        return ClientStates(self.folder / "checkpoints" / f"{stage}-clients")

    def append(self, record: Mapping[str, object]) -> None:
        """Add a round's line to the metrics."""
        with written(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def records(self, stage: str) -> list[Record]:
        """A stage's lines, in order."""
        return [record for record in self._read() if record["stage"] == stage]

    def rewind(self, stage: str, round_num: int) -> None:
        """Forget lines of a stage after a round: a crash may come between a round's line and its checkpoint."""
        kept = [record for record in self._read() if record["stage"] != stage or record["round"] <= round_num]
        write_atomically(self.metrics_file, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def _read(self) -> list[Record]:
        """All lines; a last one that was cut short is left out."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
        try:
            return [json.loads(line) for line in lines if line.endswith("\n")]
        except json.JSONDecodeError as error:
            raise RunError(f"{self.metrics_file}: a line is not JSON ({error}); start the run anew in another folder") from error

    def _state_file(self, stage: str) -> Path:
        return self.folder / "checkpoints" / f"{stage}.safetensors"


class BackgroundCheckpoint:
    """Writes a stage's states while its next round trains, one at a time. Leaving the block waits for the last.

    Args:
        store: of the run.
        stage: whose states.
    """

    def __init__(self, store: RunStore, stage: str) -> None:
        self._store, self._stage = store, stage
        self._pool, self._writing = ThreadPoolExecutor(1, "checkpoint"), Future[None]()
        self._writing.set_result(None)

    def save(self, state: ServerState) -> None:
        """Begin to replace the checkpoint, once the one before is written; an error of that one is raised here."""
        self._writing.result()
        self._writing = self._pool.submit(self._store.save_state, self._stage, state)

    def __enter__(self) -> BackgroundCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._writing.result()


@dataclass(frozen=True)
class ClientStates:
    """What clients keep from one turn to the next, on disk, a file for each client and round.

    A turn's file is pending until a later task says that its update was accepted, for that is not known where and when it is written: the
    server may refuse the update, lose it, or not wait for it. Rounds are counted from 0.
    """

    folder: Path

    def load(self, client: str, accepted: Sequence[int]) -> Slots:
        """What a client kept from the last of its accepted turns; empty before the first, and where it kept nothing.

        Raises:
            RunError: if the file is damaged.
        """
        if not accepted or not (path := self._file(client, accepted[-1])).is_file():
            return {}
        return read_checkpoint(path, "start the run anew in another folder")[0]

    def save(self, client: str, round_num: int, slots: Slots, accepted: Sequence[int]) -> None:
        """Keep what a client's turn in a round came to, beside what it kept from the accepted ones.

        Two of these are needed: after a crash the last two rounds may be trained again, the one that it cut short and the one whose
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
    """The groups of a file, and what is noted beside them: its round at least.

    Raises:
        RunError: if it is damaged.
    """
    try:
        groups, facts = unpack(path.read_bytes())
        return groups, {**facts, "round_num": int(facts["round_num"])}
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged checkpoint ({error}); {remedy}") from error
