"""What a run folder remembers: server states, replaced atomically, and one line of metrics per round."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedmllm.algorithms import ServerState
from fedmllm.errors import RunError
from fedmllm.types import Record


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash at any moment, finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def write_json(path: Path, record: Mapping[str, object]) -> None:
    """Write an indented JSON file atomically. NaN and infinity are refused: they are not JSON."""
    write_atomically(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


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
        tensors = {f"weights/{name}": tensor for name, tensor in state.weights.items()}
        tensors |= {f"{slot}/{name}": t for slot, weights in state.slots.items() for name, t in weights.items()}
        content = save({k: v.contiguous() for k, v in tensors.items()}, {"round_num": str(state.round_num)})
        write_atomically(self._state_file(stage), content)

    def load_state(self, stage: str) -> ServerState | None:
        """A stage's last checkpoint; None if it has none.

        Raises:
            RunError: if the file is damaged.
        """
        path = self._state_file(stage)
        if not path.is_file():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                round_num = int(file.metadata()["round_num"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: damaged checkpoint ({error}); delete it to train this stage anew") from error
        groups = _by_slot(tensors)
        return ServerState(groups.pop("weights"), round_num, groups)

    def append(self, record: Mapping[str, object]) -> None:
        """Add a round's line to the metrics."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
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


def _by_slot(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {"weights": {}}
    for key, tensor in tensors.items():
        slot, _, name = key.partition("/")
        groups.setdefault(slot, {})[name] = tensor
    return groups
