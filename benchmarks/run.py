"""Measure speed ratios, each against its baseline: ``make bench``, or selected rows by name: ``run.py --only trainer_b1x4_k2``.

``run.py --size 3b --device cuda`` does the same on a GPU, with random weights of real size, against the baselines that run there.

Every pair is run alternately, A B A B ..., after one warm-up of each. The table gives the median of the paired ratios. The two sides of a
pair are separate processes; one is suspended while the other works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from loops.workload import SAMPLES, SIZES, workload
from side import Side

from fedmllm import weights as W
from fedmllm.data.federated import federate
from fedmllm.evaluation.evaluate import evaluate
from fedmllm.models.frozen_products import available, direct
from fedmllm.run.results import versions
from fedmllm.training.batches import Encoder

RUNS = 5
Sizes = tuple[int, int, int]
B1X4_K2, B1X4_K10, B16_K5 = (2, 1, 4), (10, 1, 4), (5, 16, 1)
"""Clients per round, batch size, accumulation."""
ROUNDS: dict[str, tuple[str, Sizes, str]] = {
    "trainer_b1x4_k2": ("trainer", B1X4_K2, ""),
    "trainer_b1x4_k10": ("trainer", B1X4_K10, ""),
    "trainer_b16": ("trainer", B16_K5, ""),
    "flower_ray_b1x4_k2": ("flower_ray", B1X4_K2, ""),
    "flower_ray_b1x4_k10": ("flower_ray", B1X4_K10, ""),
    "nvflare_b1x4_k2": ("nvflare_simulator", B1X4_K2, ""),
    "nvflare_b1x4_k10": ("nvflare_simulator", B1X4_K10, ""),
    "without_onednn": ("ours", B1X4_K10, "onednn"),
    "without_features": ("ours", B1X4_K10, "features"),
    "without_answers_only": ("ours", B1X4_K10, "answers_only"),
    "without_merged_micro_batches": ("ours", B1X4_K10, "merged"),
    "without_training_together": ("ours", B1X4_K10, "together"),
}
"""The baseline of each ratio: a loop, its work, and the switch that is off."""
NEEDS = {"flower_ray": "ray", "nvflare_simulator": "nvflare"}
RESULTS = Path(__file__).parent / "results"


def paired(first: Callable[[], float], second: Callable[[], float]) -> dict[str, float]:
    """Time both alternately. Return the median seconds of each, and the median, least and greatest ratio second / first over the pairs."""
    first(), second()
    seconds = [(first(), second()) for _ in range(RUNS)]
    ratios = [b / a for a, b in seconds]
    return {
        "seconds": statistics.median(a for a, _ in seconds),
        "baseline_seconds": statistics.median(b for _, b in seconds),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def a_round(loop: str, sizes: Sizes, off: str, size: str, device: str) -> dict[str, float]:
    """Compare our loop with another: time, samples per second, memory in MiB (on a GPU, the GPU's), and the distance between the results."""
    with Side("ours", *sizes, "", size, device) as ours, Side(loop, *sizes, off, size, device) as other:
        row = paired(partial(alone, ours, other), partial(alone, other, ours))
        samples = sizes[0] * SAMPLES
        row |= {"samples_per_second": samples / row["seconds"], "baseline_samples_per_second": samples / row["baseline_seconds"]}
        start = workload(*sizes, size, device).start
        moved, baseline = (W.subtract(side.end(), start) for side in (ours, other))
        row["relative_distance"] = W.norm(W.subtract(moved, baseline)) / W.norm(baseline)
        peaks = [side.peak_memory() if device == "cpu" else side.gpu_mib for side in (ours, other)]
        return row | dict(zip(("peak_mib", "baseline_peak_mib"), peaks, strict=True))


def alone(working: Side, waiting: Side) -> float:
    """Return a round's seconds. The other side's processes, which poll for work even between rounds, are suspended meanwhile."""
    with waiting.stopped():
        return working.round()


def scoring() -> dict[str, dict[str, float]]:
    work = workload(1, 1, 4)
    if available():
        direct(work.vlm.model)
    data = federate(work.experiment.data, work.experiment.federation, 0)

    def score(encoder: Encoder | None, size: int) -> Callable[[], float]:
        config = work.experiment.evaluation.model_copy(update={"batch_size": size})

        def seconds() -> float:
            start = time.perf_counter()
            evaluate(work.vlm, data.dataset.test, encoder or Encoder(work.vlm, "agnostic"), "auc", config, 0)
            return time.perf_counter() - start

        return seconds

    return {
        "scoring_encoded_anew": paired(score(work.encoder, 50), score(None, 50)),
        "scoring_one_by_one": paired(score(work.encoder, 50), score(work.encoder, 1)),
    }


def measure(only: list[str], size: str, device: str) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for name, (loop, sizes, off) in ROUNDS.items():
        if (only and name not in only) or (loop in NEEDS and (size, device) != ("nano", "cpu")):
            continue
        if not importlib.util.find_spec(NEEDS.get(loop, "fedmllm")):
            print(f"{name}: left out, {NEEDS[loop]} is not installed; pip install -e .[bench]")
            continue
        rows[name] = a_round(loop, sizes, off, size, device)
        show(name, rows[name])
    if not only and device == "cpu":
        for name, row in scoring().items():
            rows[name] = row
            show(name, row)
    return rows


def show(name: str, row: dict[str, float]) -> None:
    """Print a row of the Markdown table."""
    rates = f"{row['samples_per_second']:.0f} | {row['baseline_samples_per_second']:.0f}" if "peak_mib" in row else " | "
    memory = f"{row['peak_mib']:.0f} | {row['baseline_peak_mib']:.0f} | {row['relative_distance']:.0e}" if "peak_mib" in row else " | | "
    ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
    print(f"| `{name}` | {ratio} | {row['seconds']:.2f} | {row['baseline_seconds']:.2f} | {rates} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=ROUNDS, default=[])
    parser.add_argument("--size", choices=SIZES, default="nano")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print("| | ratio: median (least to greatest) | seconds | baseline | samples/s | baseline | MiB | baseline | apart |")
    print("|---" * 9 + "|")
    rows = measure(options.only, options.size, options.device)
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": options.device}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    report = {"ratios": {name: row["ratio"] for name, row in rows.items()}, "rows": rows, "runs": RUNS, "machine": machine}
    if not options.only:
        name = "latest" if (options.size, options.device) == ("nano", "cpu") else f"{options.device}-{options.size}"
        (RESULTS / f"{name}.json").write_text(json.dumps({**report, "versions": versions()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
