"""Changes of an experiment, and what a finished run holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedmllm.config import Experiment
from fedmllm.run.reader import read_run
from fedmllm.run.results import RunResult


def change(experiment: Experiment, **sections: dict[str, Any]) -> Experiment:
    """The experiment with other settings in some sections."""
    values = experiment.model_dump(mode="json")
    for name, section in sections.items():
        values[name] |= section
    return Experiment.parse(values)


def outcome(folder: Path) -> RunResult:
    """A run's result, read from its folder."""
    result = read_run(folder).result
    assert result is not None
    return result


def comparable(folder: Path) -> tuple[Any, ...]:
    """Everything that must not depend on interruptions, which is all but times."""
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in [result, *lines]:
        for key in ("seconds", "seconds_by_stage"):
            record.pop(key, None)
    kept = [
        path for pattern in ("adapter*/**/*.safetensors", "checkpoints/**/*.safetensors", "manifest.json") for path in folder.glob(pattern)
    ]
    return result, lines, [(str(path.relative_to(folder)), path.read_bytes()) for path in sorted(kept)]


def count_lines(folder: Path) -> int:
    """The number of rounds in a run's metrics."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
