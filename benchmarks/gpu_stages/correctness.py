"""Check that parallel clients get the same gradients as single clients, and the device the same as a CPU."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.models.encoding import Encoded
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights
from fedmllm.training.local import train_in_parallel, train_locally
from fedmllm.training.rules import LocalRule
from fedmllm.training.settings import TrainingConfig
from fedmllm.types import Weights
from gpu_stages.bench import Bench
from gpu_stages.models import adapted, build, samples
from gpu_stages.training import turns

EXACT, ROUGH = 1e-4, 5e-2
"""The largest relative distances of gradients that pass: in float32, and in bfloat16 against float32."""
SHALLOW = {
    "text_config": {"num_hidden_layers": 4, "intermediate_size": 2048, "vocab_size": 32768},
    "vision_config": {"depth": 2, "fullatt_block_indexes": [1]},
}
"""Small dimensions, because a CPU has to compute the model too."""
CONFIG = TrainingConfig(batch_size=4, clip_norm=None, max_batch_tokens=1 << 20)


def correctness(bench: Bench) -> None:
    """Compare gradients of one step of three clients with equal and unequal numbers of rows: alone, in parallel, on this device and on a CPU.

    ``distance = max over clients of |g - g_reference| / |g_reference|``, each over all factors.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    exact = _stirred(build(bench, "3b", torch.float32, SHALLOW))
    rough = replace(exact, model=copy.deepcopy(exact.model).to(torch.bfloat16), dtype=torch.bfloat16)
    cpu = torch.device("cpu")
    reference = adapted(replace(exact, model=copy.deepcopy(exact.model).to(cpu), device=cpu))
    exact, rough = adapted(exact), adapted(rough)
    own = _factors(exact)
    drawn = samples(exact, 12, 60 if bench.tiny else 300)
    for rows, held in (("equal", [drawn[:4], drawn[4:8], drawn[8:]]), ("unequal", [drawn[:4], drawn[4:6], drawn[6:7]])):
        wanted = _alone(reference, held, own)
        for name, found, limit in (
            ("alone", _alone(exact, held, own), EXACT),
            ("together", _together(exact, held, own), EXACT),
            ("together in bfloat16", _together(rough, held, own), ROUGH),
        ):
            distance = max(W.norm(W.subtract(a, b)) / W.norm(b) for a, b in zip(found, wanted, strict=True))
            bench.row(f"{name}, {rows} rows, against float32 on a CPU", distance=distance, limit=limit, passed=distance < limit)


def _stirred(vlm: VisionLanguageModel) -> VisionLanguageModel:
    """Draw weights that keep the size of activations. With the usual 0.02, the outputs of a shallow model would be close to zero."""
    generator = torch.Generator(vlm.device).manual_seed(0)
    with torch.no_grad():
        for weight in vlm.model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight[0].numel() ** -0.5, generator=generator)
    return vlm


def _factors(vlm: VisionLanguageModel) -> Weights:
    """Return factors that both have a gradient. With B zero, as at the start, A would have none."""
    generator = torch.Generator().manual_seed(1)
    own = read_weights(vlm.model)
    return {n: t if factors.is_a(n) else torch.randn(t.shape, generator=generator) / 8 for n, t in own.items()}


def _alone(vlm: VisionLanguageModel, held: list[list[Encoded]], own: Weights) -> list[Weights]:
    rule = LocalRule(records_gradient=True)
    return [train_locally(vlm, replace(task, received=own), rule, CONFIG).gradient for task, _ in turns(vlm, held, CONFIG)]


def _together(vlm: VisionLanguageModel, held: list[list[Encoded]], own: Weights) -> list[Weights]:
    rule = LocalRule(records_gradient=True)
    asked = [(replace(task, received=own), rule) for task, _ in turns(vlm, held, CONFIG)]
    return [result.gradient for result in train_in_parallel(vlm, asked, CONFIG)]
