"""Show where a round's time goes, on one thread: ``python benchmarks/profile_round.py ours|trainer [COHORT BATCH_SIZE ACCUMULATION]``.

The script prints the ten operations with the largest share of self time, and the floor: the counted floating-point operations of the round's products, at
the speed of one large product.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable

import torch
from loops.workload import SAMPLES, workload
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from fedmllm.models.frozen_products import available, frozen_product

WARM = 2


def peak_flops(size: int = 1024) -> float:
    """Return the floating-point operations per second of a product of two square matrices with the faster library, the best of ten."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    products = [lambda: torch.mm(a, b), *([lambda: frozen_product(a, b, None)] if available() else [])]
    return 2 * size**3 / min(_seconds(product) for product in products for _ in range(10))


def linear_flops(x: torch.Size, weight: torch.Size, *rest: object, **named: object) -> int:
    """Return the operations of a product through oneDNN, which PyTorch's counter does not know."""
    return 2 * math.prod(x) * weight[0]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


COUNTED = {torch.ops.mkldnn._linear_pointwise: linear_flops} if available() else {}


def main(loop: str, cohort: int = 10, batch_size: int = 1, accumulation: int = 4) -> None:
    """Run two warm-up rounds, three timed rounds, one profiled and one counted, and print the results."""
    torch.set_num_threads(1)
    work, seconds, watching = workload(cohort, batch_size, accumulation), [], []
    profiler, counter = profile(activities=[ProfilerActivity.CPU]), FlopCounterMode(display=False, custom_mapping=COUNTED)
    plan = [*[None] * (WARM + 3), profiler, counter, None]

    def go() -> bool:
        while watching:
            watching.pop().__exit__(None, None, None)
        context = plan[len(seconds)]
        if context is not None:
            watching.append(context.__enter__() and context)
        return len(seconds) < len(plan) - 1

    importlib.import_module(f"loops.{loop}").run(work, go, lambda s, _: seconds.append(s))
    samples, events = cohort * SAMPLES, profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    print(f"{1e3 * min(seconds[WARM : WARM + 3]) / samples:.1f} ms per sample\n\n| operation | share | calls per sample |\n|---|---|---|")
    for event in sorted(events, key=lambda event: -event.self_cpu_time_total)[:10]:
        print(f"| `{event.key}` | {event.self_cpu_time_total / total:.1%} | {event.count / samples:.1f} |")
    flops, peak = counter.get_total_flops() / samples, peak_flops()
    print(f"\nfloor: {flops / 1e9:.2f} GFLOP per sample at {peak / 1e9:.0f} GFLOP/s: {1e3 * flops / peak:.1f} ms")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
