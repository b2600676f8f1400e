"""Ratios that matter, each measured side by side with its baseline in one process: ``make bench``.

Every pair is run alternately, A B A B ..., after one warm-up of each; the table gives the median of the paired ratios.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from loops import ours, trainer
from loops.workload import workload

from fedmllm.benchmark.results import versions
from fedmllm.data.federated import federate
from fedmllm.evaluation.evaluate import evaluate
from fedmllm.training.batches import Encoder

RUNS = 5
SWITCHES = {
    "features computed every time": "features",
    "the whole last layer": "answers_only",
    "micro-batches one by one": "merged",
    "clients one after another": "together",
}
OUTPUT = Path(__file__).parent / "results" / "latest.json"


def paired(first: Callable[[], object], second: Callable[[], object]) -> dict[str, float]:
    """Seconds of both (medians), and the median, least and greatest ratio second / first over the pairs."""
    first(), second()
    seconds = [(_seconds(first), _seconds(second)) for _ in range(RUNS)]
    ratios = [b / a for a, b in seconds]
    return {
        "seconds": statistics.median(a for a, _ in seconds),
        "baseline_seconds": statistics.median(b for _, b in seconds),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure() -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    # A workload for each side: how the model is prepared is part of it.
    for sizes in ((2, 1, 4), (10, 1, 4), (5, 16, 1)):
        name = "a round, {1} x {2}, {0} clients / a Trainer per client".format(*sizes)
        rows[name] = paired(partial(next, ours.rounds(workload(*sizes))), partial(next, trainer.rounds(workload(*sizes))))
    for off, switch in SWITCHES.items():
        sides = (ours.rounds(workload(10, 1, 4), **switches) for switches in ({}, {switch: False}))
        rows[f"a round, 1 x 4, 10 clients / {off}"] = paired(*(partial(next, side) for side in sides))
    return rows | scoring()


def scoring() -> dict[str, dict[str, float]]:
    work = workload(1, 1, 4)
    data = federate(work.experiment.data, work.experiment.federation, 0)

    def score(encoder: Encoder | None, size: int) -> Callable[[], object]:
        config = work.experiment.evaluation.model_copy(update={"batch_size": size})
        return lambda: evaluate(work.vlm, data.dataset.test, encoder or Encoder(work.vlm, "agnostic"), "auc", config, 0)

    return {
        "encoded samples kept / encoded anew, scoring": paired(score(work.encoder, 50), score(None, 50)),
        "scoring 50 at a time / one by one": paired(score(work.encoder, 50), score(work.encoder, 1)),
    }


def main() -> None:
    rows = measure()
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(json.dumps({"ratios": rows, "runs": RUNS, "machine": machine, "versions": versions()}, indent=2) + "\n")
    print(f"{'ours / baseline':<60} {'seconds':>8} {'baseline':>8} {'ratio (min to max)':>22}")
    for name, row in rows.items():
        spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        print(f"{name:<60} {row['seconds']:>8.2f} {row['baseline_seconds']:>8.2f} {spread:>22}")


if __name__ == "__main__":
    main()
