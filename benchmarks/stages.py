"""Measure the seconds of each stage of a run by the number of clients, with ten of them (or all) in a round: ``python benchmarks/stages.py``.

Every client has ten samples. A round's numbers are medians over rounds 2 to 5. Each federation runs in its own process, so that its memory can be measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from fedmllm import Experiment, train
from fedmllm.data.federated import federate
from fedmllm.models.encoding import collate
from fedmllm.models.features import VisionFeatures
from fedmllm.models.load import load_model
from fedmllm.training.batches import Encoder

CLIENTS = (2, 10, 100, 1000)
SAMPLES, ROUNDS, COHORT = 10, 5, 10
OUTPUT = Path(__file__).parent / "results" / "stages.json"


def experiment(clients: int) -> Experiment:
    """Return the settings of a federation of equal clients."""
    return Experiment.parse(
        {
            "data": {"num_train": clients * SAMPLES, "num_test": 100},
            "federation": {
                "num_clients": clients,
                "clients_per_round": min(clients, COHORT),
                "num_rounds": ROUNDS,
                "partition": "iid",
                "scenario": "missing-0.4",
            },
            "evaluation": {"every": 1, "baselines": []},
            "engine": {"device": "cpu"},
        }
    )


def measure(clients: int) -> dict[str, float]:
    """Train a federation and return its row: seconds of one-time work, seconds of a round's stages, and memory in MiB."""
    settings = experiment(clients)
    row: dict[str, float] = {"clients": clients}
    start = time.perf_counter()
    data = federate(settings.data, settings.federation, 0)
    row["data and partition"] = time.perf_counter() - start
    row |= _prepared(settings, [sample for samples in list(data.clients.values())[:COHORT] for sample in samples])
    with tempfile.TemporaryDirectory() as folder:
        train(settings, Path(folder) / "run")
        rounds = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    for stage in ("train", "aggregate", "evaluate", "checkpoint"):
        row[stage] = statistics.median(line["seconds"][stage] for line in rounds[1:])
    return row | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def _prepared(settings: Experiment, samples: list) -> dict[str, float]:  # type: ignore[type-arg]
    """Return the seconds to encode a cohort's samples and to compute the features of their pictures."""
    vlm = load_model(settings.model, torch.device("cpu"))
    encoder, keeping = Encoder(vlm, "agnostic"), replace(vlm, features=VisionFeatures(vlm, 1 << 30))
    start = time.perf_counter()
    encoded = [encoder(sample) for sample in samples]
    middle = time.perf_counter()
    for sample in encoded:
        collate(keeping, [sample])
    return {"encode a cohort": middle - start, "features of a cohort": time.perf_counter() - middle}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, help="one federation, as JSON")
    only = parser.parse_args().clients
    if only:
        print(json.dumps(measure(only)))
        return
    rows = []
    for clients in CLIENTS:
        done = subprocess.run([sys.executable, __file__, "--clients", str(clients)], check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        if len(rows) == 1:
            print(f"| {' | '.join(rows[0])} |\n{'|---' * len(rows[0])}|")
        print(f"| {' | '.join(f'{value:.3g}' if value < 100 else f'{value:.0f}' for value in rows[-1].values())} |", flush=True)
    OUTPUT.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
