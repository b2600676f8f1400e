"""Compare private training with plain training, and with private training one sample at a time: ``python benchmarks/private.py``.

One client of the embedded model, or five in parallel, train for four epochs on one thread. The three ways alternate, A B C A B C ..., after one
warm-up of each, and a ratio is the median over the repetitions. Private draws vary in size, so that times are divided by the number of samples
drawn.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from loops.workload import SAMPLES, workload
from numpy.typing import NDArray

from fedmllm.models.features import VisionFeatures
from fedmllm.models.frozen_products import available, direct
from fedmllm.models.last_layer import shorten
from fedmllm.privacy.noise import Noise
from fedmllm.run.results import versions
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_in_parallel, train_locally
from fedmllm.training.private import PrivateSteps
from fedmllm.training.rules import LocalRule
from fedmllm.training.settings import TrainingConfig

RUNS, EPOCHS = 7, 4
CASES = ((1, 4), (1, 8), (1, 16), (5, 4), (5, 16))
"""Numbers of clients and batch sizes."""
Train = Callable[[list[LocalTask], TrainingConfig, PrivateSteps | None], None]
OUTPUT = Path(__file__).parent / "results" / "private.json"


class Counting(Noise):
    """A source of noise that counts the samples drawn at a rate."""

    rate, drawn = 1.0, 0

    def uniform(self, count: int) -> NDArray[np.float64]:
        found = super().uniform(count)
        self.drawn += int((found < self.rate).sum())
        return found


def measure(clients: int, batch_size: int) -> dict[str, float]:
    """Return a row: samples per second of the three ways, and two ratios of seconds per sample with their least and greatest value."""
    tasks, train = _prepared(clients)
    config, noise = TrainingConfig(batch_size=batch_size, local_epochs=EPOCHS), Counting()
    noise.rate = batch_size / SAMPLES
    private = PrivateSteps(1.0, 1.0, noise, lambda client, steps, rate: None)

    def private_seconds(config: TrainingConfig) -> float:
        noise.drawn = 0
        return _seconds(lambda: train(tasks, config, private)) / noise.drawn

    ways = {
        "plain": lambda: _seconds(lambda: train(tasks, config, None)) / (EPOCHS * SAMPLES * clients),
        "private": lambda: private_seconds(config),
        "one by one": lambda: private_seconds(config.model_copy(update={"max_batch_tokens": 1})),
    }
    for way in ways.values():
        way()
    times = [{name: way() for name, way in ways.items()} for _ in range(RUNS)]
    row: dict[str, float] = {"clients": clients, "batch_size": batch_size}
    row |= {f"{name} samples/s": statistics.median(1 / seconds[name] for seconds in times) for name in ways}
    for name, over, under in (("private / plain", "private", "plain"), ("one by one / private", "one by one", "private")):
        ratios = [seconds[over] / seconds[under] for seconds in times]
        row |= {name: statistics.median(ratios), f"{name} least": min(ratios), f"{name} greatest": max(ratios)}
    return row


def _prepared(clients: int) -> tuple[list[LocalTask], Train]:
    """Return the tasks of clients, and their training with everything on that makes it fast."""
    work = workload(clients, 1, 4)
    vlm = replace(work.vlm, features=VisionFeatures(work.vlm, 1 << 30))
    shorten(vlm.model)
    if available():
        direct(vlm.model)
    tasks = [LocalTask(name, 0, 0, [work.encoder(sample) for sample in some], work.start, 1e-3) for name, some in work.clients.items()]

    def train(tasks: list[LocalTask], config: TrainingConfig, private: PrivateSteps | None) -> None:
        if len(tasks) == 1:
            train_locally(vlm, tasks[0], LocalRule(), config, None, private)
        else:
            train_in_parallel(vlm, [(task, LocalRule()) for task in tasks], config, None, private)

    return tasks, train


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for clients, batch_size in CASES:
        rows.append(measure(clients, batch_size))
        if len(rows) == 1:
            print(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
        print(f"| {' | '.join(f'{value:.3g}' for value in rows[-1].values())} |", flush=True)
    OUTPUT.write_text(json.dumps({"rows": rows, "runs": RUNS, "threads": 1, "versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
