"""The memory plan and the token budget."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fedmllm import weights as W
from fedmllm.data.federated import FederatedData
from fedmllm.models import memory
from fedmllm.models.encoding import answer_nll, collate
from fedmllm.models.load import VisionLanguageModel, load_model
from fedmllm.models.lora import attach_lora, read_weights
from fedmllm.models.memory import CPU_TOKENS, TokenBudget, clients_at_once, out_of_memory, peak_bytes, rows_at_once
from fedmllm.models.parts import LoraConfig
from fedmllm.models.settings import ModelConfig
from fedmllm.training.batches import Encoder
from fedmllm.training.client import LocalTask
from fedmllm.training.local import train_in_parallel, train_locally
from fedmllm.training.rules import LocalRule
from fedmllm.training.settings import TrainingConfig
from private_steps import Scripted, steps_with

MIB = 4 * 2**18
"""Bytes of the matrix below."""


@pytest.fixture
def vlm(nano: VisionLanguageModel) -> VisionLanguageModel:
    """The embedded model: a tiny model needs too little memory to measure."""
    return nano


def test_peak_bytes_counts_tensors_that_are_alive_at_once() -> None:
    """In units of x: tensors freed on the way do not count at the end. A view and an in-place change take no memory."""
    x = torch.randn(512, 512, requires_grad=True)

    def forward_and_backward(again: bool) -> None:
        def layer(y: torch.Tensor) -> torch.Tensor:
            return y.sin().sin().sin()

        y = x * 2
        for _ in range(4):
            y = checkpoint(layer, y, use_reentrant=False) if again else layer(y)
        y.sum().backward()  # type: ignore[no-untyped-call]
        x.grad = None

    assert peak_bytes(lambda: x.detach() + 1) == MIB
    assert peak_bytes(lambda: (x.detach() + 1).add_(1).view(-1)[3:]) == MIB
    assert peak_bytes(lambda: ((x.detach() + 1) + 1) + 1) == 2 * MIB
    # 13 results, plus two gradients in the backward pass. Recomputed: the inputs of 4 layers, one layer's 3 results and two gradients.
    assert peak_bytes(lambda: forward_and_backward(False)) // MIB == 15
    assert peak_bytes(lambda: forward_and_backward(True)) // MIB == 9


def test_the_memory_of_a_pass_grows_with_its_tokens(vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData) -> None:
    """At least what a decoder layer's attention and gate need; at most a generous bound on a float32 pass's intermediate results."""
    samples = sorted(map(encoder, federation.clients["client-00"]), key=lambda sample: len(sample.input_ids))
    text = vlm.model.config.get_text_config()
    least = 4 * text.num_hidden_layers * (4 * text.hidden_size + 2 * text.intermediate_size)
    for sample in (samples[0], samples[-1]):
        peak = peak_bytes(lambda sample=sample: answer_nll(vlm, collate(vlm, [sample])).sum().backward())  # type: ignore[misc]
        assert least < peak / len(sample.input_ids) < 5 * least


def test_the_budget_follows_from_the_devices_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.6 of the free bytes divided by bytes per token, here 4 MiB for 100 tokens. It is measured once, and not at all if it is set."""
    passes: list[int] = []

    def work() -> torch.Tensor:
        passes.append(1)
        return torch.zeros(2**20)

    for device, fixed, free, expected in (
        ("cpu", None, 0, CPU_TOKENS),
        ("cuda", 77, 0, 77),
        ("cuda", None, 40 * MIB, 600),
        ("cuda", None, 9, 1),
    ):
        monkeypatch.setattr(memory, "_free_bytes", lambda device, free=free: free)
        passes.clear()
        budget = TokenBudget(fixed)
        for _ in range(2):
            budget.measure(torch.device(device), 100, work)
            assert budget.tokens == expected
        assert len(passes) == (device == "cuda" and fixed is None)


class OnAGpu(TokenBudget):
    """A budget that measures as on a GPU and records the model's training mode."""

    def __init__(self, vlm: VisionLanguageModel) -> None:
        super().__init__()
        self.vlm, self.modes = vlm, list[bool]()

    def measure(self, device: torch.device, length: int, work: Callable[[], object]) -> None:
        self.modes.append(self.vlm.model.training)
        super().measure(torch.device("cuda"), length, work)


@pytest.mark.parametrize("parallel", [False, True])
def test_the_budget_is_measured_in_training_mode(
    parallel: bool, encoder: Encoder, federation: FederatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recomputed layers hold far less memory, but only in training mode. Measuring does not change the losses."""
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 2**30)
    samples = [encoder(sample) for sample in federation.clients["client-00"][:3]]
    tokens = []
    for checkpoints in (False, True):
        vlm = attach_lora(load_model(ModelConfig(gradient_checkpointing=checkpoints), torch.device("cpu")), LoraConfig(), 0)
        client = (LocalTask("a", 0, 0, samples, read_weights(vlm.model), 1e-3), LocalRule())
        budget, losses = OnAGpu(vlm), []
        for given in (None, budget):
            if parallel:
                losses.append(train_in_parallel(vlm, [client, client], TrainingConfig(), given)[0].metrics["loss"])
            else:
                losses.append(train_locally(vlm, *client, TrainingConfig(), given).metrics["loss"])
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert budget.modes == [True]
        assert budget.tokens is not None
        tokens.append(budget.tokens)
    assert tokens[1] > 2 * tokens[0]


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_private_pass_needs_memory_for_the_rows_own_adapters(
    checkpoints: bool, encoder: Encoder, federation: FederatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring leaves nothing in the sum of the first step. Recomputed layers use the rows' own adapters too."""
    monkeypatch.setattr(memory, "_free_bytes", lambda device: 2**30)
    samples = [encoder(sample) for sample in federation.clients["client-00"][:3]]
    vlm = attach_lora(load_model(ModelConfig(gradient_checkpointing=checkpoints), torch.device("cpu")), LoraConfig(r=64), 0)
    task, budgets, sources = LocalTask("a", 0, 0, samples, read_weights(vlm.model), 0.0), [], []
    for private, budget in ((False, OnAGpu(vlm)), (True, OnAGpu(vlm)), (True, None)):
        sources.append(Scripted([[0, 1, 2]]))
        train_locally(vlm, task, LocalRule(), TrainingConfig(), budget, steps_with(sources[-1]) if private else None)
        budgets.append(budget.tokens if budget else None)
    assert budgets[0] is not None
    assert budgets[1] is not None
    assert budgets[1] < budgets[0]
    for name, total in sources[2].sums[0].items():
        torch.testing.assert_close(sources[1].sums[0][name], total, atol=1e-6, rtol=1e-4)
    assert W.norm(sources[2].sums[0]) > 0


def test_the_number_of_parallel_clients_follows_from_a_gpus_memory(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's tensors take 16 bytes for each of 73,728 parameters; they may use a fifth of the memory."""
    assert clients_at_once(vlm) is None
    for free, clients in ((5 * 16 * 73_728 * 7, 7), (5 * 16 * 73_728 * 7 - 5, 6), (1, 1)):
        monkeypatch.setattr(memory, "_free_bytes", lambda device, free=free: free)
        assert clients_at_once(replace(vlm, device=torch.device("cuda"))) == clients


def test_a_pass_that_did_not_fit_halves_the_budget(caplog: pytest.LogCaptureFixture) -> None:
    budget = TokenBudget(1000)
    with caplog.at_level(logging.WARNING):
        budget.halve(700, "CUDA out of memory")
    assert (budget.tokens, budget.halvings) == (350, 1)
    assert "a pass of 700 tokens did not fit into memory (CUDA out of memory); later passes have at most 350 tokens" in caplog.text


@pytest.mark.parametrize(
    ("error", "memory_failed"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_failed_allocations_are_recognized(error: Exception, memory_failed: bool) -> None:
    assert out_of_memory(error) == memory_failed


def test_rows_with_their_own_adapters_are_limited_by_memory(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row has a copy of each trainable tensor and its gradient, 4 bytes each. At least one row passes at a time."""
    row = 2 * 4 * sum(tensor.numel() for tensor in read_weights(vlm.model).values())
    assert rows_at_once(vlm) == (1 << 30) // row
    monkeypatch.setattr(memory, "CPU_ROWS_BYTES", 10 * row + 7)
    assert [rows_at_once(vlm), rows_at_once(vlm, threads=2), rows_at_once(vlm, threads=20)] == [10, 5, 1]
