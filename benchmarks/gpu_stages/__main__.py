"""Run one stage in this process."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from gpu_stages.bench import Bench
from gpu_stages.stages import STAGES

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    if chosen.device == "cpu":
        # As on a GPU: the profiler records one thread, and PyTorch's compiler crashes if two threads use it at once.
        torch.set_num_threads(1)
    STAGES[chosen.stage](Bench(chosen.stage, chosen.rows, torch.device(chosen.device), chosen.tiny, chosen.seconds))
