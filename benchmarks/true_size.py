"""A federated round of models of true size with random weights, on one GPU: speed, peak memory against the plan, bytes.

    python benchmarks/true_size.py [--kinds qwen2_5_vl minicpmv4_6] [--device cuda] [--set model.quantization=4bit ...]

Each model is written as a folder with its own kind of processor, loaded and trained by ``fedmllm.train``. Leaves ``results/true_size.json``.
``--tiny`` takes the models of ``examples/tiny_models.py`` instead, to try the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedmllm import Experiment, train
from fedmllm.benchmark.models_view import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import tiny_models

QWEN2_5_VL_3B = {
    "text_config": {
        **{"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
        **{"head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048},
        **{"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
    },
    "tie_word_embeddings": True,
}
MINICPM_V_4_6 = {
    "text_config": {
        **{"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 2},
        **{"head_dim": 256, "vocab_size": 248320, "max_position_embeddings": 32768, "tie_word_embeddings": True},
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
        | {"partial_rotary_factor": 0.25},
    },
    "vision_config": {
        **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
        **{"image_size": 980, "patch_size": 14},
    },
    **{"insert_layer_id": 6, "image_size": 448, "tie_word_embeddings": True},
}
"""Dimensions of the published models; the heads of MiniCPM-V 4.6's decoder are those of Qwen3.5 of its width."""
TRUE = {
    "qwen2_5_vl": (QWEN2_5_VL_3B, {"min_pixels": 448 * 448, "max_pixels": 448 * 448, "patch_size": 14}),
    "minicpmv4_6": (MINICPM_V_4_6, {"scale_resolution": 448, "patch_size": 14, "max_slice_nums": 9}),
}
"""By kind, the model's settings and those of its image processor: pictures of 448 x 448."""


def make(kind: str, folder: Path, device: str) -> None:
    """Write the model in bfloat16; weights are drawn on the device, where that takes a moment."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes, images = TRUE[kind]
    processor = tiny_models.processor(kind, images)
    settings = tiny_models.RECIPES[kind].config(processor.tokenizer.convert_tokens_to_ids)
    settings = {name: {**value, **sizes.get(name, {})} if isinstance(value, dict) else value for name, value in settings.items()}
    settings |= {name: value for name, value in sizes.items() if not isinstance(value, dict)}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.bfloat16)
    model.generation_config.update(eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def experiment(name: Path, device: str, overrides: list[str]) -> Experiment:
    """Two clients, three rounds: in the first features are computed, which later ones find."""
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
    """Build, plan, train."""
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
