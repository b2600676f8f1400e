"""Run one side of a comparison: ``python -m loops NAME COHORT BATCH_SIZE ACCUMULATION SIZE DEVICE OFF FILE``.

For each line on standard input, it trains one round, writes the round's seconds and the GPU's peak memory in MiB to standard output, and writes the mean of
the clients' weights to FILE.
"""

from __future__ import annotations

import importlib
import os
import sys

import torch
from safetensors.torch import save_file

from fedmllm.types import Weights
from loops.workload import workload

if __name__ == "__main__":
    name, *counts, size, device, off, path = sys.argv[1:]
    # Libraries may print to standard output, which must carry only seconds; and a loop may continue in a fork, whose standard input is closed.
    asked, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def done(seconds: float, mean: Weights) -> None:
        save_file({key: tensor.contiguous() for key, tensor in mean.items()}, path)
        print(seconds, torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0, file=answers, flush=True)

    work = workload(*map(int, counts), size, device)
    importlib.import_module(f"loops.{name}").run(work, lambda: bool(asked.readline()), done, off)
