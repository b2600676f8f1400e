"""Partition one million samples over ten thousand clients, under 30 s and 2 GB.

    python benchmarks/partition.py [SAMPLES] [CLIENTS]

Each partition and each scenario is timed; creating the samples is not. Peak memory is that of the process, samples included.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from fedmllm.data.modalities import apply_scenario
from fedmllm.data.partition import Indices, dirichlet, iid, natural, quantity
from fedmllm.randomness import generator
from fedmllm.types import Sample

T = TypeVar("T")

MIN_SIZE = 8
OPTIONS = tuple("ABCDEFGH")


def samples(count: int, num_clients: int) -> list[Sample]:
    """Return samples of eight unbalanced classes, each with an image path and a text of its own."""
    rng = generator(0, "labels")
    labels = rng.choice(OPTIONS, size=count, p=[0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02]).tolist()
    owners = rng.integers(2 * num_clients, size=count).tolist()
    return [
        Sample(f"s{i:07d}", "Which?", label, {"image": f"images/{i:07d}.jpg", "text": f"text {i}"}, OPTIONS, label, client=f"site-{owner}")
        for i, (label, owner) in enumerate(zip(labels, owners, strict=True))
    ]


def main(count: int, num_clients: int) -> None:
    rows = samples(count, num_clients)
    categories, owners = [row.category for row in rows], [row.client for row in rows]
    parts: Indices = []
    for name, split in {
        "iid": lambda: iid(count, num_clients, MIN_SIZE, generator(0, "p")),
        "quantity 0.5": lambda: quantity(count, num_clients, 0.5, MIN_SIZE, generator(0, "p")),
        "natural": lambda: natural(owners, num_clients, MIN_SIZE),
        "dirichlet 0.5": lambda: dirichlet(categories, num_clients, 0.5, MIN_SIZE, generator(0, "p")),
    }.items():
        parts = _timed(f"partition {name}", split)
    clients = {f"client-{k:05d}": [rows[i] for i in part] for k, part in enumerate(parts)}
    for scenario in ("aligned", "missing-0.4", "cross-5:5", "hybrid-0.7"):
        _timed(f"scenario {scenario}", lambda scenario=scenario: apply_scenario(scenario, clients, ("image", "text"), 0))
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def _timed(name: str, work: Callable[[], T]) -> T:
    start = time.perf_counter()
    result = work()
    print(f"{name:<24}{time.perf_counter() - start:6.2f} s", flush=True)
    return result


if __name__ == "__main__":
    numbers = [int(number.replace("_", "")) for number in sys.argv[1:]]
    main(*numbers, *(1_000_000, 10_000)[len(numbers) :])
