"""Measure rounds of parallel clients, trained as the engine trains them: speed, utilization, memory against the plan."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmllm import weights as W
from fedmllm.models.encoding import Encoded
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.lora import read_weights
from fedmllm.models.memory import TokenBudget
from fedmllm.models.parts import LoraConfig
from fedmllm.models.plan import Plan, make_plan
from fedmllm.models.settings import ModelConfig
from fedmllm.training.batches import batched
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_in_parallel
from fedmllm.training.rules import LocalResult, LocalRule
from fedmllm.training.settings import TrainingConfig
from gpu_stages.bench import Bench
from gpu_stages.flops import needed_flops
from gpu_stages.models import samples

TINY_TOKENS = {300: 60, 1200: 120}
"""Tokens of a sample if models are tiny, by the tokens otherwise."""


@dataclass(frozen=True)
class Case:
    """The shape of a round.

    Attributes:
        clients: number of parallel clients.
        batch, accumulation: samples per micro-batch, and micro-batches per step.
        tokens: mean tokens per sample.
        steps: steps of each client.
        spread: relative spread of the samples' lengths around ``tokens``.
        pictured: whether samples have pictures.
    """

    clients: int
    batch: int = 1
    accumulation: int = 4
    tokens: int = 300
    steps: int = 3
    spread: float = 1 / 12
    pictured: bool = True

    @property
    def name(self) -> str:
        """The row's name in the table."""
        return f"K = {self.clients}, {self.shape} tokens"

    @property
    def shape(self) -> str:
        """Batch and length of a client's samples, whatever the number of clients."""
        return f"{self.batch} x {self.accumulation}, {self.tokens:,}"

    @property
    def config(self) -> TrainingConfig:
        """Training settings of each client."""
        return TrainingConfig(batch_size=self.batch, accumulation=self.accumulation, learning_rate=1e-4)

    def held(self, bench: Bench, vlm: VisionLanguageModel) -> list[list[Encoded]]:
        """Return each client's samples."""
        each = self.batch * self.accumulation * self.steps
        tokens = TINY_TOKENS[self.tokens] if bench.tiny else self.tokens
        drawn = samples(vlm, self.clients * each, tokens, self.spread, self.pictured)
        return [drawn[k * each : (k + 1) * each] for k in range(self.clients)]


def turns(vlm: VisionLanguageModel, held: Sequence[Sequence[Encoded]], config: TrainingConfig) -> list[tuple[LocalTask, LocalRule]]:
    """Return each client's task and rule."""
    start = read_weights(vlm.model)
    return [(LocalTask(f"client-{k}", 0, 0, own, start, config.learning_rate), LocalRule()) for k, own in enumerate(held)]


def measure(bench: Bench, vlm: VisionLanguageModel, case: Case, name: str = "", reference: Sequence[LocalResult] = ()) -> list[LocalResult]:
    """Train the round several times after a warm-up, and add its row.

    Args:
        bench: the device and the time left.
        vlm: the model with adapters.
        case: the round.
        name: the row's name; the case's own if empty.
        reference: results of another variant with the same samples; the row then has the distance between the two, as ``apart`` computes it.

    Returns:
        the results of the last round.
    """
    held, budget, results = case.held(bench, vlm), TokenBudget(), list[LocalResult]()
    asked = turns(vlm, held, case.config)

    def work() -> None:
        results[:] = train_in_parallel(vlm, asked, case.config, budget)

    if bench.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = bench.repeated(work)
    everything = [sample for own in held for sample in own]
    row = {**seconds, "samples": len(everything), "tokens": sum(len(sample.input_ids) for sample in everything)}
    row |= {"model": vlm.name, "shape": case.shape}
    row |= {"flops": flops(vlm, everything)} | ({"distance": apart(results, reference)} if reference else {})
    row |= {"clients": case.clients, "pass_tokens": largest_pass(vlm, held, case, budget), "budget_tokens": budget.tokens}
    row |= {"halvings": budget.halvings, "loss": results[0].metrics["loss"]}
    row["peak_bytes"] = torch.cuda.max_memory_allocated() if bench.cuda else None
    bench.row(name or case.name, **row)
    return results


def flops(vlm: VisionLanguageModel, everything: Sequence[Encoded]) -> float | None:
    """Return the operations that a round needs; None for a decoder whose operations are not known."""
    text = vlm.model.config.get_text_config()
    dense = not getattr(text, "layer_types", None) or set(text.layer_types) == {"full_attention"}
    return needed_flops(text, everything) if dense else None


def apart(results: Sequence[LocalResult], reference: Sequence[LocalResult]) -> float:
    """Return ``max over clients of |w - w_reference| / |w_reference - w_received|``."""
    pairs = zip(results, reference, strict=True)
    return max(W.norm(W.subtract(a.weights, b.weights)) / W.norm(W.subtract(b.weights, b.received)) for a, b in pairs)


def largest_pass(vlm: VisionLanguageModel, held: Sequence[Sequence[Encoded]], case: Case, budget: TokenBudget) -> int:
    """Return the padded tokens of the largest pass of the first step."""
    step = [sample for own in held for sample in own[: case.batch * case.accumulation]]
    groups = [[len(step[i].input_ids) for i in group] for group in batched(vlm, step, budget.tokens or 1)]
    return max(len(group) * max(group) for group in groups)


def add_plan(bench: Bench, vlm: VisionLanguageModel) -> None:
    """Add a row with the result of ``fedmllm models plan``, for comparison with the peaks of the stage's other rows."""
    with tempfile.TemporaryDirectory() as folder:
        vlm.model.get_base_model().config.save_pretrained(folder)
        dtype = "float32" if vlm.dtype == torch.float32 else "bfloat16"
        plan: Plan = make_plan(ModelConfig(name=folder, dtype=dtype), LoraConfig())
    bench.row(
        "plan",
        parameters=plan.parameters,
        trainable=plan.trainable,
        weight_bytes=plan.weight_bytes,
        bytes_per_token=plan.bytes_per_token,
        seconds=None,
    )
