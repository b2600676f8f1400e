"""Trains a grid's cells in one or several processes. Finished cells are skipped, interrupted ones resumed, failed ones retried."""

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
from fedmllm.models.source import check_source
from fedmllm.registry import load_plugins
from fedmllm.run.resident import Resident
from fedmllm.run.train import train
from fedmllm.sweeps.code_version import code_version
from fedmllm.sweeps.grid import Cell, Grid, names


@dataclass(frozen=True)
class Outcome:
    """The outcome of a cell in this session.

    Attributes:
        cell: the cell.
        score: score of the federated model; None if the cell failed.
        seconds: duration in seconds.
        error: the error; empty if the cell succeeded.
    """

    cell: Cell
    score: float | None
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Places:
    """Paths of a cell's files: its run folder, and next to it a file of names, the last error and a lock."""

    folder: Path

    @classmethod
    def of(cls, output: Path, cell: Cell) -> Places:
        """Return a cell's paths in a sweep folder."""
        return cls(output / "cells" / cell.key)

    @property
    def names(self) -> Path:
        """JSON file with the cell's labels and the code version."""
        return self.folder.with_suffix(".json")

    @property
    def error(self) -> Path:
        """File with the traceback of the last failure."""
        return self.folder.with_suffix(".error")

    @property
    def lock(self) -> Path:
        """Lock file, held while a process works on the cell."""
        return self.folder.with_suffix(".lock")

    @property
    def finished(self) -> bool:
        """Whether the cell has a result."""
        return (self.folder / "result.json").is_file()


def share(cells: Sequence[Cell], shard: str) -> list[Cell]:
    """Return the cells of a shard ``i/n``. Adjacent cells stay in the same shard, because they share data.

    Raises:
        ConfigError: if the shard is not one of 0/n, 1/n, ..., (n - 1)/n.
    """
    try:
        index, count = map(int, shard.split("/"))
    except ValueError:
        index, count = -1, 0
    if not 0 <= index < count:
        raise ConfigError(f"--shard: {shard!r} is not a valid share; use i/n with i from 0 to n - 1, e.g. 0/2 and 1/2")
    return list(cells[index * len(cells) // count : (index + 1) * len(cells) // count])


def require_sources(cells: Sequence[Cell], grid: Path) -> None:
    """Check that the models and data of a sweep exist, before any training.

    Args:
        cells: the cells to train.
        grid: the grid's file, whose comments should say where models and data come from.

    Raises:
        RunError: naming each folder that does not exist.
    """
    problems: dict[str, None] = {}
    for cell in cells:
        problems |= {f"{root}: no such data folder": None for root in cell.experiment.data.roots if not root.is_dir()}
        try:
            check_source(cell.experiment.model)
        except ModelError as error:
            problems[str(error)] = None
    if problems:
        raise RunError(f"models or data of the grid are missing; the comments in {grid} say where to get them:\n{listing(problems)}")


def open_sweep(grid: Grid, output: Path) -> None:
    """Create a sweep folder and record the grid's names and their order in it.

    Raises:
        RunError: if the folder holds something else or cannot be created.
    """
    require_folder(output / "cells")
    if output.exists() and not (output / "cells").is_dir() and any(output.iterdir()):
        raise RunError(f"{output}: the folder is not empty and not a sweep folder; choose another --output")
    (output / "cells").mkdir(parents=True, exist_ok=True)
    write_json(output / "grid.json", names(grid))


def run_sweep(
    cells: Sequence[Cell], output: Path, jobs: int = 1, threads: int | None = None, ended: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Train the cells that are not finished.

    Args:
        cells: cells of a grid, or of a share of it.
        output: the sweep folder.
        jobs: number of processes. Each has its own resident model.
        threads: threads per process; None for the CPU cores divided by the jobs.
        ended: called with each cell's outcome when the cell ends.

    Returns:
        The outcomes in the order in which the cells ended.
    """
    (output / "cells").mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if not Places.of(output, cell).finished]
    outcomes = []
    for outcome in _in_processes(missing, output, jobs, threads) if jobs > 1 else _in_turn(missing, output, threads):
        ended(outcome)
        outcomes.append(outcome)
    return outcomes


def _in_turn(cells: Sequence[Cell], output: Path, threads: int | None) -> Iterator[Outcome]:
    """Train the cells one after another in this process."""
    _prepare(threads)
    return (_run_cell(cell, output) for cell in cells)


def _in_processes(cells: Sequence[Cell], output: Path, jobs: int, threads: int | None) -> Iterator[Outcome]:
    each = threads or max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (each,))
    try:
        for done in as_completed([pool.submit(_run_cell, cell, output) for cell in cells]):
            yield _outcome(done)
    except BaseException:
        # The remaining processes are in the middle of a cell whose result is no longer needed.
        left = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in left:
            process.terminate()
        raise
    pool.shutdown()


def _outcome(done: Future[Outcome]) -> Outcome:
    """Return the outcome of a cell that another process trained.

    Raises:
        RunError: if a process of the sweep has died.
    """
    try:
        return done.result()
    except BrokenProcessPool:
        raise RunError(
            "a process of the sweep was killed, perhaps because memory ran out; use fewer --jobs, and run the same command again to continue"
        ) from None


_RESIDENT: list[Resident] = []
"""The caches of this process, once they exist."""


def _begin(threads: int) -> None:
    """Set up a process of the pool. It ignores keyboard interrupts, because the parent handles them and ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prepare(threads)


def _prepare(threads: int | None) -> None:
    import torch

    _RESIDENT[:] = [Resident()]
    if threads is not None:
        torch.set_num_threads(threads)


def _run_cell(cell: Cell, output: Path) -> Outcome:
    """Train or resume a cell. It keeps the run's numbers and adapter, and deletes the checkpoints."""
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
            # One cell's failure must not stop the others. It is recorded and reported, and the next sweep retries the cell.
            write_atomically(places.error, traceback.format_exc().encode())
            return Outcome(cell, None, time.perf_counter() - start, f"{type(error).__name__}: {error}")
        places.error.unlink(missing_ok=True)
        shutil.rmtree(places.folder / "checkpoints", ignore_errors=True)
    return Outcome(cell, result.scores["federated"], time.perf_counter() - start)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Yield whether this process got the lock. The lock is released when the process ends, even if it crashes."""
    try:
        import fcntl
    except ImportError:
        # Windows has no such locks. There, the user must not start two sweeps of the same shard at once.
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
    """Return the cells whose last attempt failed, as ``names: last line of the error``."""
    found = []
    for path in sorted((output / "cells").glob("*.error")):
        labels = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        names = " / ".join(str(value) for name, value in labels.items() if name != "code")
        found.append(f"{names}: {path.read_text(encoding='utf-8').strip().splitlines()[-1]}")
    return found
