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
from pathlib import Path

import torch

from fedmllm.benchmark.results import versions
from fedmllm.config import Experiment
from fedmllm.data.federated import federate
from fedmllm.evaluation.evaluate import evaluate
from fedmllm.models.load import load_model
from fedmllm.models.lora import attach_lora, read_weights
from fedmllm.training.batches import Encoder
from fedmllm.training.local import LocalTask, TrainingConfig, train_locally
from fedmllm.training.rules import LocalRule

RUNS = 5
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
    experiment = Experiment.parse({"data": {"num_train": 96, "num_test": 100}, "federation": {"num_clients": 1, "clients_per_round": 1}})
    data = federate(experiment.data, experiment.federation, 0)
    device = torch.device("cpu")
    vlm = attach_lora(load_model(experiment.model, device), experiment.lora, 0)
    kept = Encoder(vlm, "agnostic")
    samples = [kept(sample) for sample in data.clients["client-00"]]
    task = LocalTask("client-00", 0, 0, samples, read_weights(vlm.model), 1e-3)

    def training(**settings: int) -> Callable[[], object]:
        config = TrainingConfig(**settings)  # type: ignore[arg-type]
        return lambda: train_locally(vlm, task, LocalRule(), config)

    def scoring(cache: bool, size: int) -> Callable[[], object]:
        config = experiment.evaluation.model_copy(update={"batch_size": size})
        return lambda: evaluate(vlm, data.dataset.test, kept if cache else Encoder(vlm, "agnostic"), "auc", config, 0)

    return {
        "micro-batches of a step as one batch (1 x 4) / one by one": paired(
            training(batch_size=1, accumulation=4), training(batch_size=1, accumulation=4, max_batch_tokens=1)
        ),
        "encoded samples kept / encoded anew, scoring": paired(scoring(True, 50), scoring(False, 50)),
        "scoring 50 at a time / one by one": paired(scoring(True, 50), scoring(True, 1)),
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
