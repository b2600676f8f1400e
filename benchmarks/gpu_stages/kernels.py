"""Show where the time of a step goes: kernels by share, and how long the device is idle."""

from __future__ import annotations

from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fedmllm.models.memory import TokenBudget
from fedmllm.training.local import train_in_parallel
from gpu_stages.bench import Bench
from gpu_stages.models import adapted, build
from gpu_stages.training import Case, turns

SHOWN = 20


def profiled(bench: Bench) -> None:
    """Profile one step of ten clients at 1 x 4. Add a row for each of the 20 slowest kernels (on a CPU, operations), and the idle share."""
    vlm = adapted(build(bench, "3b"))
    case, budget = Case(2 if bench.tiny else 10, steps=1), TokenBudget()
    asked = turns(vlm, case.held(bench, vlm), case.config)

    def step() -> None:
        train_in_parallel(vlm, asked, case.config, budget)

    plain = bench.repeated(step, 2)["seconds"]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
    with profile(activities=activities) as profiler:
        watched = bench.timed(step)
    kind = DeviceType.CUDA if bench.cuda else DeviceType.CPU
    # Annotations such as an optimizer's step also have a span on the device, in which the device may be idle.
    events = [event for event in profiler.events() if event.device_type == kind and not event.is_user_annotation]
    busy = union([(event.time_range.start, event.time_range.end) for event in events]) / 1e6
    launched = sum(event.name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for event in profiler.events())
    bench.row("a step", seconds=plain, watched=watched, busy=busy, idle=1 - busy / watched if bench.cuda else None, launches=launched)
    for name, count, total in heaviest(profiler, bench.cuda):
        bench.row(name[:100], seconds=total, count=count, share=total / watched)


def heaviest(profiler: Any, cuda: bool) -> list[tuple[str, int, float]]:
    """Return name, calls and seconds of the kernels with the largest self time."""
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    rows = [row for row in profiler.key_averages() if row.device_type == kind and not row.is_user_annotation]
    seconds = {row.key: (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e6 for row in rows}
    return [(row.key, row.count, seconds[row.key]) for row in sorted(rows, key=lambda row: -seconds[row.key])[:SHOWN]]


def union(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of some intervals."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered
