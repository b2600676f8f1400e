"""A grid run cell by cell, in one process or several: finished cells are skipped, broken off ones resumed, failed ones tried again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from fedmllm.errors import ConfigError, ModelError, RunError, listing
from fedmllm.files import require_folder, write_atomically, write_json
from fedmllm.models.load import check_source
from fedmllm.registry import load_plugins
from fedmllm.run.resident import Resident
from fedmllm.run.train import train
from fedmllm.sweeps.grid import Cell, Grid, code_version, names


@dataclass(frozen=True)
class Outcome:
    """What became of a cell in this sitting.

    Attributes:
        cell: which.
        score: of the federated model; None for a cell that failed.
        seconds: how long it took.
        error: what went wrong; empty if nothing did.
    """

    cell: Cell
    score: float | None
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Places:
    """Where a cell's files are: its run folder, and beside it its names, its last error and a lock."""

    folder: Path

    @classmethod
    def of(cls, output: Path, cell: Cell) -> Places:
        """In the folder of a sweep."""
        return cls(output / "cells" / cell.key)

    @property
    def names(self) -> Path:
        """Labels and code version, as JSON."""
        return self.folder.with_suffix(".json")

    @property
    def error(self) -> Path:
        """The traceback of a failure."""
        return self.folder.with_suffix(".error")

    @property
    def lock(self) -> Path:
        """Held while a process works on the cell."""
        return self.folder.with_suffix(".lock")

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return (self.folder / "result.json").is_file()


def share(cells: Sequence[Cell], shard: str) -> list[Cell]:
    """The cells of a shard ``i/n``: neighbors stay together, since they share data.

    Raises:
        ConfigError: if the shard is not one of 0/n, 1/n, ..., (n - 1)/n.
    """
    try:
        index, count = map(int, shard.split("/"))
    except ValueError:
        index, count = -1, 0
    if not 0 <= index < count:
        raise ConfigError(f"--shard: {shard!r} is no share; write i/n with i from 0 to n - 1, e.g. 0/2 and 1/2")
    return list(cells[index * len(cells) // count : (index + 1) * len(cells) // count])


def require_sources(cells: Sequence[Cell], grid: Path) -> None:
    """Refuse a sweep whose models or data are not here, before any of it is trained.

    Args:
        cells: whose.
        grid: the file, whose head should say where they come from.

    Raises:
        RunError: naming each folder that is not there.
    """
    problems: dict[str, None] = {}
    for cell in cells:
        problems |= {f"{root}: no such folder of data": None for root in cell.experiment.data.roots if not root.is_dir()}
        try:
            check_source(cell.experiment.model)
        except ModelError as error:
            problems[str(error)] = None
    if problems:
        raise RunError(f"what the grid needs is not here; the head of {grid} says where it comes from:\n{listing(problems)}")


def open_sweep(grid: Grid, output: Path) -> None:
    """Make a sweep's folder, and note in it in which order the grid names things.

    Raises:
        RunError: if there is something else at that place, or it cannot be made.
    """
    require_folder(output / "cells")
    if output.exists() and not (output / "cells").is_dir() and any(output.iterdir()):
        raise RunError(f"{output}: not empty, and no sweep; choose another --output")
    (output / "cells").mkdir(parents=True, exist_ok=True)
    write_json(output / "grid.json", names(grid))


def run_sweep(
    cells: Sequence[Cell], output: Path, jobs: int = 1, threads: int | None = None, told: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Run what is missing of some cells.

    Args:
        cells: of a grid, or a share of it.
        output: the sweep's folder.
        jobs: processes, each with a resident model of its own.
        threads: of each process's computations; None for the cores divided by the jobs.
        told: about each cell as it ends.

    Returns:
        the outcomes in the order in which they came.
    """
    (output / "cells").mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not Places.of(output, cell).finished]
    outcomes = []
    for outcome in _in_processes(missing, output, jobs, threads) if jobs > 1 else _in_turn(missing, output, threads):
        told(outcome)
        outcomes.append(outcome)
    return outcomes


def _in_turn(cells: Sequence[Cell], output: Path, threads: int | None) -> Iterator[Outcome]:
    """In this process."""
    _prepare(threads)
    return (_run_cell(cell, output) for cell in cells)


def _in_processes(cells: Sequence[Cell], output: Path, jobs: int, threads: int | None) -> Iterator[Outcome]:
    each = threads or max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (each,))
    try:
        for done in as_completed([pool.submit(_run_cell, cell, output) for cell in cells]):
            yield _outcome(done)
    except BaseException:
        # Those that are left are in the middle of a cell whose result nobody waits for.
        left = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in left:
            process.terminate()
        raise
    pool.shutdown()


def _outcome(done: Future[Outcome]) -> Outcome:
    """What a process says of a cell.

    Raises:
        RunError: if a process of the sweep has died.
    """
    try:
        return done.result()
    except BrokenProcessPool:
        raise RunError(
            "a process of the sweep was ended from outside, perhaps for lack of memory, which fewer --jobs need less of; the same command goes on"
        ) from None


_RESIDENT: list[Resident] = []
"""This process's."""


def _begin(threads: int) -> None:
    """A process of the pool. An interruption from the keyboard is for the parent, which ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prepare(threads)


def _prepare(threads: int | None) -> None:
    import torch

    _RESIDENT[:] = [Resident()]
    if threads is not None:
        torch.set_num_threads(threads)


def _run_cell(cell: Cell, output: Path) -> Outcome:
    """Train a cell, or finish it; what it leaves is its numbers and adapter, without checkpoints."""
    places, start = Places.of(output, cell), time.perf_counter()
    with _locked(places.lock) as free:
        if not free:
            return Outcome(cell, None, 0.0, f"{places.lock}: another process works on this cell")
        write_json(places.names, cell.labels | {"code": code_version()})
        try:
            # This process may have been handed the cell without having read its settings.
            load_plugins(cell.experiment.plugins)
            begun = (places.folder / "config.yaml").is_file()
            result = train(cell.experiment, places.folder, name=cell.method, resume=begun, resident=_RESIDENT[0])
        except Exception as error:
            # One cell's failure must not end the others': whatever it is, it is written down, told and tried again next time.
            write_atomically(places.error, traceback.format_exc().encode())
            return Outcome(cell, None, time.perf_counter() - start, f"{type(error).__name__}: {error}")
        places.error.unlink(missing_ok=True)
        shutil.rmtree(places.folder / "checkpoints", ignore_errors=True)
    return Outcome(cell, result.scores["federated"], time.perf_counter() - start)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether nobody else held the lock; it is let go when the process ends, however it does."""
    try:
        import fcntl
    except ImportError:
        # No such locks on Windows: there two sweeps of one shard must not be started at once.
        yield True
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
    path.unlink(missing_ok=True)


def failures(output: Path) -> list[str]:
    """Cells whose last try failed, as ``names: last line of the error``."""
    found = []
    for path in sorted((output / "cells").glob("*.error")):
        labels = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        names = " / ".join(str(value) for name, value in labels.items() if name != "code")
        found.append(f"{names}: {path.read_text(encoding='utf-8').strip().splitlines()[-1]}")
    return found
