"""The stages by name. Each is a function of a ``Bench`` that adds rows as it runs."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Callable
from importlib import metadata

import torch

from fedmllm.errors import ModelError
from fedmllm.models.features import serves
from fedmllm.models.load import require_transformers
from gpu_stages.bench import Bench
from gpu_stages.ceilings import ceilings
from gpu_stages.changes import changes
from gpu_stages.correctness import correctness
from gpu_stages.kernels import profiled
from gpu_stages.models import adapted, build
from gpu_stages.quantized import in_four_bits
from gpu_stages.trainer import beside
from gpu_stages.training import Case, add_plan, measure

PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "pydantic", "numpy", "triton"),
    *("liger-kernel", "flash-linear-attention", "causal-conv1d", "bitsandbytes"),
)


def versions(bench: Bench) -> None:
    """Record installed packages and the device, and check that models read features; without that, no other stage is useful."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    device = {"device": torch.cuda.get_device_name() if bench.cuda else platform.processor() or platform.machine()}
    if bench.cuda:
        device |= {"memory_bytes": torch.cuda.get_device_properties(0).total_memory, "cuda": torch.version.cuda}
    bench.row("versions", python=platform.python_version(), **found, **device)
    require_transformers(found["transformers"] or "0")
    tiny = Bench(bench.stage, bench.rows, bench.device, tiny=True)
    if not serves(build(tiny, "3b", torch.float32)):
        raise ModelError("the model reads no features in place of pictures; bring the Transformers of benchmarks/README.md")


def train_3b(bench: Bench) -> None:
    """Measure the 3B model with different numbers of clients, batches and lengths."""
    vlm = adapted(build(bench, "3b"))
    cases = [Case(10), Case(2), Case(5), Case(5, batch=16, accumulation=1, steps=2), Case(10, tokens=1200, steps=1)]
    for case in cases[:1] + cases[-1:] if bench.tiny else cases:
        measure(bench, vlm, case)
    add_plan(bench, vlm)


def train_7b(bench: Bench) -> None:
    """Measure the 7B model."""
    vlm = adapted(build(bench, "7b"))
    for case in (Case(10, steps=2), Case(2)):
        measure(bench, vlm, case)
    add_plan(bench, vlm)


def train_135m(bench: Bench) -> None:
    """Measure a small decoder on text, which shows the cost of a step beyond its arithmetic."""
    vlm = adapted(build(bench, "135m"), features=False)
    for case in (Case(10, pictured=False), Case(2, pictured=False)):
        measure(bench, vlm, case)


def minicpm(bench: Bench) -> None:
    """Measure linear attention, on text."""
    if importlib.util.find_spec("fla") is None or not bench.cuda:
        bench.row("fla", left_out="flash-linear-attention is not installed" if bench.cuda else "its kernels need a GPU")
        return
    try:
        _minicpm(bench, "with fla")
    except RuntimeError as error:
        # Its kernels refuse compilers that gave wrong results: Triton 3.4 to 3.7 on an H100 or H200.
        bench.row("fla", left_out=f"{type(error).__name__}: {error}"[:300])


def minicpm_without_fla(bench: Bench) -> None:
    """Measure the same without flash-linear-attention, which Transformers looks for at import."""
    sys.modules["fla"] = None  # type: ignore[assignment]
    _minicpm(bench, "without fla")


def _minicpm(bench: Bench, how: str) -> None:
    case = Case(10, pictured=False, steps=1)
    measure(bench, adapted(build(bench, "minicpm"), features=False), case, f"{case.name}, {how}")


def train_4bit(bench: Bench) -> None:
    """Measure the 3B model with frozen weights in 4 bits."""
    if importlib.util.find_spec("bitsandbytes") is None:
        bench.row("4 bits", left_out="bitsandbytes is not installed")
        return
    vlm = adapted(in_four_bits(build(bench, "3b")))
    for case in (Case(10, steps=1), Case(2, steps=2)):
        measure(bench, vlm, case)


STAGES: dict[str, Callable[[Bench], None]] = {
    "versions": versions,
    "ceilings": ceilings,
    "correctness": correctness,
    "train_3b": train_3b,
    "trainer": beside,
    "profile": profiled,
    "changes": changes,
    "train_7b": train_7b,
    "train_135m": train_135m,
    "minicpm": minicpm,
    "minicpm_without_fla": minicpm_without_fla,
    "train_4bit": train_4bit,
}
