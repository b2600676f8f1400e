"""Train federated rounds of models of real size with random weights on one GPU: speed, peak memory against the plan, bytes.

    python benchmarks/true_size.py [--kinds qwen2_5_vl minicpmv4_6] [--device cuda] [--set model.quantization=4bit ...]

Each model is written as a folder with its own kind of processor, then loaded and trained by ``fedmllm.train``. The script writes
``results/true_size.json``. ``--tiny`` uses the models of ``examples/tiny_models.py`` instead, to test the script without a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_stages.models import SIZES, tiny_models

from fedmllm import Experiment, train
from fedmllm.reports.models import describe

TRUE = {size.kind: size for size in (SIZES["3b"], SIZES["minicpm"])}
"""Sizes by kind of model."""


def make(kind: str, folder: Path, device: str) -> None:
    """Write the model in bfloat16. Weights are drawn on the device, which is faster."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    processor = tiny_models.processor(kind, TRUE[kind].images)
    settings = TRUE[kind].settings(processor.tokenizer.convert_tokens_to_ids)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.bfloat16)
    model.generation_config.update(eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def experiment(name: Path, device: str, overrides: list[str]) -> Experiment:
    """Return settings of two clients and three rounds. The first round computes features, and the later ones reuse them."""
    values: dict[str, Any] = {
        "model": {"name": str(name), "dtype": "bfloat16", "max_length": 2048},
        "data": {"num_train": 128, "num_test": 32},
        "federation": {"num_clients": 2, "clients_per_round": 2, "num_rounds": 3, "partition": "iid"},
        "training": {"batch_size": 8, "max_batch_tokens": 4096},
        "evaluation": {"every": 0, "baselines": []},
        "engine": {"device": device},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(json.dumps(values))
        file.flush()
        return Experiment.load(file.name, overrides)


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Build, plan and train a model, and return its row."""
    with tempfile.TemporaryDirectory() as space:
        folder, run = Path(space) / kind, Path(space) / "run"
        if options.tiny:
            tiny_models.make(kind, folder)
        else:
            make(kind, folder, options.device)
        settings = experiment(folder, options.device, options.set)
        plan = describe(settings)
        cuda = options.device == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        result = train(settings, run)
        rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in rounds if line["stage"] == "federated"]
    return {
        "parameters": plan["parameters"],
        "trainable": plan["trainable"],
        "samples_per_second": [line["num_samples"] / line["seconds"]["train"] for line in own],
        "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
        "planned_memory": plan["memory_by_tokens"][4096],
        "bytes_up_per_client_and_round": result.bytes_up / 6,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "overrides": options.set,
        "versions": result.versions,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kinds", nargs="+", choices=TRUE, default=list(TRUE))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "true_size.json")
    chosen = parser.parse_args()
    rows = {kind: measure(kind, chosen) for kind in chosen.kinds}
    text = json.dumps(rows, indent=1)
    print(text)
    if not chosen.tiny:
        chosen.output.write_text(text + "\n")
