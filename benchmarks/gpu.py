"""Measure training on a GPU in one command: correctness, speed, utilization, memory, a profile.

    python benchmarks/gpu.py [--deadline 430] [--out DIR] [--only STAGE ...] [--tiny --device cpu]

Each stage is a process with its own time limit, which appends rows to ``DIR/rows.jsonl`` as it runs. A stage that fails or takes too long loses only its own
rows. At the end, or after an interruption, the script writes ``DIR/gpu.json`` and ``DIR/table.md``. The output of the stages is in ``DIR/log.txt``.
With ``--only``, rows of other stages in DIR are kept, so that stages that were cut off can be
measured later. ``--tiny --device cpu`` runs everything without a GPU. benchmarks/README.md says what each number decides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_table import report, table

LIMITS = {
    "versions": 30,
    "ceilings": 30,
    "correctness": 45,
    "train_3b": 90,
    "trainer": 70,
    "profile": 50,
    "changes": 80,
    "train_7b": 70,
    "train_135m": 35,
    "minicpm": 35,
    "minicpm_without_fla": 35,
    "train_4bit": 45,
}
"""Time limit of each stage in seconds, in the order in which they run, the most important first."""
_LEAST = 5
"""A stage is not started with this many seconds left or fewer."""


def run(stage: str, seconds: float, folder: Path, options: argparse.Namespace) -> str:
    """Run a stage. Return ``ok``, ``failed`` or ``timed out``."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "gpu_stages", stage, str(folder / "rows.jsonl"), "--device", options.device, "--seconds", str(seconds)]
    paths = [str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    with (folder / "log.txt").open("ab") as log:
        log.write(f"\n== {stage}\n".encode())
        log.flush()
        child = subprocess.Popen(
            [*command, *(["--tiny"] if options.tiny else [])], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        return "failed" if child.wait(seconds) else "ok"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        # This also kills processes that the stage started, such as a compiler.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Run one stage after another while time is left, and add a row about each."""
    end = time.monotonic() + options.deadline
    for stage in options.only or LIMITS:
        begun, left = time.monotonic(), end - time.monotonic()
        outcome = run(stage, min(LIMITS[stage], left), folder, options) if left > _LEAST else "no time left"
        row = {"stage": stage, "outcome": outcome, "wall": round(time.monotonic() - begun, 1)}
        with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{stage:<20}{outcome:<14}{row['wall']:>6.1f} s", flush=True)
        if (stage, outcome) == ("versions", "failed"):
            print(f"nothing else is measured: {(folder / 'log.txt').read_text(errors='replace').strip().splitlines()[-1]}")
            return


def read(path: Path) -> list[dict[str, Any]]:
    """Return all rows. A line that a killed process left incomplete is skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deadline", type=float, default=430, help="seconds for all stages together")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=[], metavar="STAGE", help=f"of {', '.join(LIMITS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kept = [row for row in read(folder / "rows.jsonl") if row["stage"] not in options.only] if options.only else []
    for name in ("rows.jsonl", "log.txt", "gpu.json", "table.md"):
        (folder / name).unlink(missing_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    complete = True
    try:
        measure(options, folder)
    except KeyboardInterrupt:
        complete = False
        print("interrupted: the table has what was measured so far")
    rows = read(folder / "rows.jsonl")
    whole = report(rows, options.tiny)
    (folder / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(table(whole), encoding="utf-8")
    print(table(whole))
    return 0 if complete and all(row["outcome"] == "ok" for row in whole["stages"]) and whole["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
